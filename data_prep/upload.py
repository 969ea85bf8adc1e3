"""A finished set of shards brought to an object store, the manifest last."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from data_prep.manifest import MANIFEST_NAME, Manifest, read_manifest
from data_prep.storage import RemotePath, StorageError

_NOTE_NAME = "uploading.sha256"
_OURS = re.compile(
    r"shard-\d{6,}\.(tar|index\.npy)|manifest\.json|rejected\.jsonl|statistics\.json|uploading\.sha256"
)


def upload_set(manifest: Manifest, destination: RemotePath, *, overwrite: bool = False) -> Manifest:
    """Upload a set from a folder on this machine and return it as it is at `destination`.

    An upload that was stopped goes on where it was: a note on the store says of which set the
    objects there are. A prefix with a manifest is complete.

    Raises:
        StorageError: the store does not answer, or holds something else.
    """
    assert isinstance(manifest.folder, Path)
    content = (manifest.folder / MANIFEST_NAME).read_bytes()
    if (destination / MANIFEST_NAME).exists():
        if (destination / MANIFEST_NAME).read_bytes() == content:
            return read_manifest(destination)
        if not overwrite:
            raise StorageError(
                f"{destination} holds another finished set. Choose another prefix, or replace it "
                "with --overwrite."
            )
    present = _settle(destination, content, overwrite)
    for path in sorted(manifest.folder.iterdir()):
        if path.is_file() and path.name != MANIFEST_NAME:
            known = path.name in present
            if not known or (destination / path.name).stat().st_size != path.stat().st_size:
                (destination / path.name).upload(path)
    (destination / MANIFEST_NAME).write_bytes(content)
    (destination / _NOTE_NAME).unlink(missing_ok=True)
    return read_manifest(destination)


def _settle(destination: RemotePath, content: bytes, overwrite: bool) -> set[str]:
    """Return the names of this set's objects that are there; clear others if that is allowed."""
    digest = hashlib.sha256(content).hexdigest().encode()
    try:
        present = {path.name for path in destination.glob("*")}
    except FileNotFoundError:
        present = set()
    note = destination / _NOTE_NAME
    foreign = [name for name in sorted(present) if not _OURS.fullmatch(name)]
    if foreign:
        raise StorageError(
            f"{destination} holds other things ({', '.join(foreign[:3])}). Give an empty prefix."
        )
    if present and not (_NOTE_NAME in present and note.read_bytes() == digest):
        if not overwrite:
            raise StorageError(
                f"{destination} holds shards of another set ({min(present)}). Give an empty "
                "prefix, or replace them with --overwrite."
            )
        for name in sorted(present, key=lambda name: name != MANIFEST_NAME):
            (destination / name).unlink(missing_ok=True)
        present = set()
    note.write_bytes(digest)
    return present
