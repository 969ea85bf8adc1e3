"""The folder that shards are written to: nothing in it is replaced or left half by accident.

Shards are written into `.partial` inside it, beside a note of what they are made from. When all
are there they are moved up, and the manifest is written last: a folder with one is complete.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.index import index_name
from data_prep.manifest import (
    MANIFEST_NAME,
    STATISTICS_NAME,
    Manifest,
    ShardEntry,
    read_index,
    read_manifest,
    write_aside,
    write_manifest,
)
from data_prep.shard import Rejection, ShardReport, shard_name

REJECTED_NAME = "rejected.jsonl"
_PARTIAL_NAME = ".partial"
_NOTE_NAME = "made-from.json"
_OURS = re.compile(r"shard-\d{6,}\.(tar|index\.npy)")
_KNOWN = {MANIFEST_NAME, REJECTED_NAME, STATISTICS_NAME, _PARTIAL_NAME, "lost+found"}


class DestinationError(ValueError):
    """The destination holds something that must not be written over."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a set of shards is made from: two of the same identity are equal byte for byte."""

    options: dict[str, Any]
    """Options as plain values, the source's name among them."""
    fingerprint: str
    """Digest of the inputs."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A folder that is being written to by this process alone."""

    folder: Path
    """Where the set will be."""
    created: Path | None
    """Outermost folder that had to be made for it."""
    identity: Identity
    """What the set is made from."""

    @property
    def partial(self) -> Path:
        """Folder that unfinished work is in."""
        return self.folder / _PARTIAL_NAME

    def publish(
        self, reports: Sequence[ShardReport], classes: Sequence[str], rejected: Sequence[Rejection]
    ) -> Manifest:
        """Move finished shards up, numbered without gaps, and write the manifest."""
        for name in (MANIFEST_NAME, STATISTICS_NAME):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        entries = [report.entry for report in reports if report.entry is not None]
        moved = tuple(self._move(entry, number) for number, entry in enumerate(entries))
        self._write_rejected(rejected)
        manifest = Manifest(
            folder=self.folder,
            shards=moved,
            classes=tuple(classes),
            rejected=len(rejected),
            notes=dict(
                sorted(sum((Counter(report.notes) for report in reports), Counter()).items())
            ),
            options=self.identity.options,
            fingerprint=self.identity.fingerprint,
        )
        write_manifest(manifest)
        shutil.rmtree(self.partial)
        return manifest

    def abandon(self) -> None:
        """Remove all unfinished work, and the folders that were made for it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if self.created is not None:
            folder = self.folder
            while not any(folder.iterdir()):
                folder.rmdir()
                if folder == self.created:
                    break
                folder = folder.parent

    def _move(self, entry: ShardEntry, number: int) -> ShardEntry:
        name = shard_name(number)
        moved = replace(entry, name=name, index=index_name(name))
        (self.partial / entry.name).replace(self.folder / moved.name)
        (self.partial / entry.index).replace(self.folder / moved.index)
        return moved

    def _write_rejected(self, rejected: Sequence[Rejection]) -> None:
        path = self.folder / REJECTED_NAME
        if rejected:
            lines = [json.dumps(asdict(rejection)) + "\n" for rejection in rejected]
            write_aside(path, "".join(lines).encode())
        else:
            path.unlink(missing_ok=True)


def find_complete(folder: Path, identity: Identity) -> Manifest | None:
    """Return the manifest of a set of this identity that is complete, else None.

    Raises:
        DestinationError: the folder holds something else.
    """
    _refuse_foreign(folder)
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    made_from = Identity(options=dict(manifest.options), fingerprint=manifest.fingerprint)
    if made_from != identity:
        raise DestinationError(
            f"{folder} holds a finished set of {manifest.samples:,} samples made from "
            f"{_difference(made_from, identity)}. Choose another folder, or replace it with "
            "--overwrite."
        )
    for shard in manifest.shards:
        read_index(folder, shard)
    shutil.rmtree(folder / _PARTIAL_NAME, ignore_errors=True)
    return manifest


@contextmanager
def open_destination(folder: Path, identity: Identity, *, overwrite: bool) -> Iterator[Destination]:
    """Take a folder for writing; what an interrupted run of the same identity finished is kept.

    Raises:
        DestinationError: it holds something else, or another process writes to it.
        OSError: it cannot be written.
    """
    _refuse_foreign(folder)
    created = _first_missing(folder)
    partial = folder / _PARTIAL_NAME
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DestinationError(
                f"another data-prep is writing to {folder}. Wait for it, or choose another folder."
            ) from None
        _settle_unfinished(partial, identity, overwrite)
        yield Destination(folder=folder, created=created, identity=identity)


def _settle_unfinished(partial: Path, identity: Identity, overwrite: bool) -> None:
    """Keep unfinished work of the same identity; clear away any other, if that is allowed."""
    note = partial / _NOTE_NAME
    text = json.dumps(asdict(identity), indent=1)
    if note.exists() and note.read_text() != text and not overwrite:
        made_from = Identity(**json.loads(note.read_text()))
        raise DestinationError(
            f"{partial.parent} holds an interrupted run made from "
            f"{_difference(made_from, identity)}. Give the same to go on with it, or start anew "
            "with --overwrite."
        )
    keep = note.exists() and note.read_text() == text
    for path in partial.iterdir():
        if path.name != "lock" and (not keep or ".partial-" in path.name):
            path.unlink()
    write_aside(note, text.encode())


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DestinationError(f"{folder} is a file. Give a folder to write shards to.")
    names = sorted(path.name for path in folder.iterdir())
    ours = bool({MANIFEST_NAME, _PARTIAL_NAME} & set(names))
    foreign = [
        name
        for name in names
        if name not in _KNOWN
        and not (ours and _OURS.fullmatch(name))
        and not name.startswith((f".{MANIFEST_NAME}.partial", f".{REJECTED_NAME}.partial"))
    ]
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise DestinationError(
            f"{folder} holds other things ({shown}). Give an empty or a new folder."
        )
    if (folder / MANIFEST_NAME).exists() and "source" not in read_manifest(folder).options:
        raise DestinationError(
            f"{folder} holds tars that data-prep did not write. Give an empty or a new folder."
        )


def _difference(old: Identity, new: Identity) -> str:
    names = sorted(
        name
        for name in {**old.options, **new.options}
        if old.options.get(name) != new.options.get(name)
    )
    if not names:
        return "other files of the same source, or the same files with other dates"
    changed = [
        f"{name} {old.options.get(name)!r} (now {new.options.get(name)!r})" for name in names
    ]
    return "other options: " + ", ".join(changed)


def _first_missing(folder: Path) -> Path | None:
    missing = None
    while not folder.exists():
        missing, folder = folder, folder.parent
    return missing
