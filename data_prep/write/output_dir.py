"""The output folder of a set: nothing in it is replaced or left half-written by accident.

Shards are written into its subfolder `.partial`, next to the listing of the source and a record of
what they are made from. When all are there they are moved up, and the manifest is written last: a
folder with a manifest is complete. Several parts of a run may write at the same time; a run is
finalized under an exclusive lock.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.format.atomic import atomic_write_bytes, remove_leftovers, sync_folder
from data_prep.format.index import index_name, read_index
from data_prep.format.manifest import (
    LOCK_NAME,
    MANIFEST_NAME,
    PARTIAL_NAME,
    Manifest,
    read_manifest,
    write_manifest,
)
from data_prep.format.statistics_file import STATISTICS_NAME
from data_prep.format.storage import Location, RemotePath
from data_prep.write.duplicates import DIGESTS
from data_prep.write.shard import ShardReport, read_report, shard_exists
from data_prep.write.upload import Upload, check_uploaded, refuse_foreign_shards

REJECTED_NAME = "rejected.jsonl"
VALIDATION_SHARDS = "validation_shards"
"""Option in the manifest: number of shards, at the end, for validation."""
_WORK_VERSION = 2
"""Version of the contents of `.partial`; raise it when they change, so that none are mixed."""
_NOTE_NAME = "made-from.json"
_OTHER_INPUT = "other files of the same source, or the same files with other dates"
_SHARD_FILES = re.compile(r"shard-\d{6,}\.(tar|index\.npy)")
_OUTCOMES = {VALIDATION_SHARDS}  # options in the manifest that record results
_KNOWN_NAMES = {MANIFEST_NAME, REJECTED_NAME, STATISTICS_NAME, PARTIAL_NAME, "lost+found"}
_TEMPORARY_PREFIXES = tuple(
    f".{name}.partial" for name in (MANIFEST_NAME, REJECTED_NAME, STATISTICS_NAME)
)


class OutputDirError(ValueError):
    """The output folder holds something that must not be overwritten."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Options and inputs of a set of shards: sets with equal identities are equal byte for byte."""

    options: dict[str, Any]
    """Options as plain values, with the name of the source."""
    fingerprint: str
    """Digest of the inputs; empty while they are still being listed."""

    def is_compatible_with(self, other: "Identity") -> bool:
        """Return whether both may be the same, as far as their fingerprints are known."""
        known = self.fingerprint and other.fingerprint
        return self.options == other.options and (
            not known or self.fingerprint == other.fingerprint
        )


@dataclass(frozen=True, kw_only=True)
class OutputDir:
    """An output folder opened for writing, by this process alone or as one of several parts."""

    folder: Path
    """Folder of the set, or of its shards until they are uploaded."""
    created: Path | None
    """Outermost folder that had to be created."""
    upload: Upload | None = None
    """Upload to a store; None: the set stays in `folder`."""

    @property
    def place(self) -> Location:
        """Location of the finished set."""
        return self.folder if self.upload is None else self.upload.place

    @property
    def partial(self) -> Path:
        """Folder of unfinished work."""
        return self.folder / PARTIAL_NAME

    def identity(self) -> Identity | None:
        """Return the identity of the unfinished work, or None if there is none."""
        note = self._note()
        return Identity(**note["identity"]) if note is not None else None

    def begin(self, identity: Identity) -> None:
        """Record the identity of the work, once its listing is complete."""
        note = {"version": _WORK_VERSION, "identity": asdict(identity)}
        atomic_write_bytes(self.partial / _NOTE_NAME, json.dumps(note, indent=1).encode())

    def check_version(self, *, overwrite: bool = False) -> None:
        """Check that unfinished work has this version, or remove it with `overwrite`.

        Raises:
            OutputDirError: it has another version and must be kept.
        """
        note = self._note()
        if note is None or note.get("version") == _WORK_VERSION:
            return
        if not overwrite:
            raise OutputDirError(
                f"{self.place} holds an interrupted run of another version of data-prep, which "
                "cannot be resumed. Finish it with that version, or start afresh with --overwrite."
            )
        self.clear()

    def _note(self) -> dict[str, Any] | None:
        try:
            note: dict[str, Any] = json.loads((self.partial / _NOTE_NAME).read_text())
        except FileNotFoundError:
            return None
        return note

    def check_identity(self, identity: Identity) -> None:
        """Check that unfinished work is made from the same options and input.

        Raises:
            OutputDirError: it is not.
        """
        made_from = self.identity()
        if made_from is not None and not made_from.is_compatible_with(identity):
            raise self.mismatch_error(_difference(made_from, identity))

    def mismatch_error(self, difference: str = _OTHER_INPUT) -> OutputDirError:
        """Return the error for unfinished work that is made from something else."""
        return OutputDirError(
            f"{self.place} holds an interrupted run made from {difference}. Give the same to "
            "resume it, or start afresh with --overwrite."
        )

    def clear(self) -> None:
        """Remove all unfinished work except digests, which depend on the files alone."""
        for path in self.partial.iterdir():
            if not path.name.endswith("lock") and not path.name.startswith(DIGESTS):
                path.unlink()

    @contextmanager
    def listing_lock(self) -> Iterator[None]:
        """Hold the lock under which only one part lists the source."""
        with (self.partial / "listing.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def reports(self, numbers: Iterable[int]) -> Iterator[ShardReport | None]:
        """Yield the report of each shard, None if the shard is not finished or missing.

        Args:
            numbers: numbers of planned shards; all of them if the set is uploaded.
        """
        position = 0
        for number in numbers:
            report = read_report(self.partial, number)
            if report is None or report.entry is None:
                yield report
                continue
            is_there = shard_exists(self.partial, report.entry)
            if not is_there and self.upload is not None:
                is_there = self.upload.has_shard(report.entry, position)
            position += 1
            yield report if is_there else None

    def publish(self, manifest: Manifest, names: Sequence[str]) -> Manifest:
        """Move finished shards up, unless they are uploaded, and write the manifest.

        Args:
            manifest: manifest of the set.
            names: file names of its shards in `.partial`.

        Raises:
            StorageError: the store does not answer, or lacks shards.
        """
        if self.upload is not None:
            manifest = self.upload.publish(manifest, self.partial / REJECTED_NAME)
            shutil.rmtree(self.folder, ignore_errors=True)
            return manifest
        # First, since a full disk would otherwise leave moved shards without a manifest.
        write_manifest(replace(manifest, folder=self.partial))
        for name in (MANIFEST_NAME, STATISTICS_NAME):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if _SHARD_FILES.fullmatch(path.name):
                path.unlink()
        for name, shard in zip(names, manifest.shards, strict=True):
            (self.partial / name).replace(self.folder / shard.name)
            (self.partial / index_name(name)).replace(self.folder / shard.index)
        if manifest.rejected:
            (self.partial / REJECTED_NAME).replace(self.folder / REJECTED_NAME)
        else:
            (self.folder / REJECTED_NAME).unlink(missing_ok=True)
        (self.partial / MANIFEST_NAME).replace(self.folder / MANIFEST_NAME)
        sync_folder(self.folder)
        shutil.rmtree(self.partial)
        return manifest

    def abandon(self) -> None:
        """Remove all unfinished work, and the folders created for it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if self.created is not None:
            folder = self.folder
            while not any(folder.iterdir()):
                folder.rmdir()
                if folder == self.created:
                    break
                folder = folder.parent


def read_complete_set(place: Location, identity: Identity) -> Manifest:
    """Return the manifest of a complete set after checking that it has this identity.

    Raises:
        OutputDirError: it is another set.
        StorageError: the store does not answer, or data-prep did not write the shards.
        ManifestError: shards are missing.
    """
    manifest = read_manifest(place)
    refuse_foreign_shards(manifest)
    options = {name: value for name, value in manifest.options.items() if name not in _OUTCOMES}
    made_from = Identity(options=options, fingerprint=manifest.fingerprint)
    if made_from != identity:
        raise OutputDirError(
            f"{place} holds a finished set (samples: {manifest.samples:,}) made from "
            f"{_difference(made_from, identity)}. Choose another folder, or replace the set with "
            "--overwrite."
        )
    if isinstance(place, RemotePath):
        check_uploaded(manifest)
        return manifest
    for shard in manifest.shards:
        read_index(place, shard)
    shutil.rmtree(place / PARTIAL_NAME, ignore_errors=True)
    return manifest


@contextmanager
def open_output_dir(
    folder: Path,
    *,
    part: int | None = None,
    store: RemotePath | None = None,
    overwrite: bool = False,
) -> Iterator[OutputDir]:
    """Open a folder for writing under a lock, with the unfinished work in it.

    Args:
        folder: folder of the set, or of its shards until they are uploaded.
        part: number of this part, next to other parts that write; None: exclusive.
        store: URL of the set; None: it stays in the folder.
        overwrite: whether to replace what is at the URL.

    Raises:
        OutputDirError: it holds other files, or another process writes to it.
        StorageError: the store does not answer, or holds other files.
        OSError: it cannot be written.
    """
    refuse_other_files(folder)
    created = _first_missing(folder)
    partial = folder / PARTIAL_NAME
    upload = None if store is None else Upload(store, partial, overwrite=overwrite)
    if upload is not None:
        upload.check_target()
    partial.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        _lock(stack, partial / LOCK_NAME, folder, shared=part is not None)
        if part is None:
            for path in partial.glob(".*"):
                path.unlink()  # half-written by a process that is gone
        else:
            _lock(stack, partial / f"part-{part}.lock", folder, shared=False)
        remove_leftovers(folder)
        refuse_other_files(folder)  # again, since another process may have ended meanwhile
        yield OutputDir(folder=folder, created=created, upload=upload)


def _lock(stack: ExitStack, path: Path, folder: Path, *, shared: bool) -> None:
    """Lock a file, which a process that is just ending may remove together with its folder."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputDirError(
                f"another data-prep is writing to {folder}. Wait for it, or choose another folder."
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                stack.enter_context(file)
                return
        file.close()


def refuse_other_files(folder: Path) -> None:
    """Check that a folder holds nothing but a set of shards, finished or not.

    Raises:
        OutputDirError: it holds other files.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputDirError(f"{folder} is a file. Give a folder to write shards to.")
    names = sorted(path.name for path in folder.iterdir())
    ours = bool({MANIFEST_NAME, PARTIAL_NAME} & set(names))
    foreign = [
        name
        for name in names
        if name not in _KNOWN_NAMES
        and not (ours and _SHARD_FILES.fullmatch(name))
        and not name.startswith(_TEMPORARY_PREFIXES)
    ]
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise OutputDirError(f"{folder} holds other files ({shown}). Give an empty or new folder.")
    if (folder / MANIFEST_NAME).exists():
        refuse_foreign_shards(read_manifest(folder))


def refuse_inside(source: Location, output: Location) -> None:
    """Check that the output folder is not inside the source.

    Raises:
        OutputDirError: it is, so that the next listing would find the shards.
    """
    if isinstance(source, Path) and isinstance(output, Path):
        inside = output.resolve().is_relative_to(source.resolve())
    else:
        inside = f"{output}/".startswith(f"{source}/")
    if inside:
        raise OutputDirError(
            f"{output} is inside the source {source}, where the next run would find the shards. "
            "Give a folder outside of the source."
        )


def _difference(old: Identity, new: Identity) -> str:
    names = sorted(
        name
        for name in {**old.options, **new.options}
        if old.options.get(name) != new.options.get(name)
    )
    if not names:
        return _OTHER_INPUT
    changed = [
        f"{name} {old.options.get(name)!r} (now {new.options.get(name)!r})" for name in names
    ]
    return "other options: " + ", ".join(changed)


def _first_missing(folder: Path) -> Path | None:
    missing = None
    while not folder.exists():
        missing, folder = folder, folder.parent
    return missing
