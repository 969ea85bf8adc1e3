"""Upload of a set to an object store, shard by shard, by exactly one run.

Shards are uploaded under their final names, in order, and then removed locally. The manifest comes
last: a prefix with a manifest is complete. Until then a note next to the shards identifies the run,
and a local log records the checksum uploaded under each name. An object counts as a shard only if
the note is this run's, the log has its checksum, and the store its length; whatever a killed run
had not finished is uploaded again.
"""

import os
import platform
import re
import secrets
import threading
from dataclasses import replace
from pathlib import Path

from data_prep.executors.processes import Tick
from data_prep.format.atomic import atomic_write_bytes, name_in_errors
from data_prep.format.index import index_name
from data_prep.format.manifest import (
    MANIFEST_NAME,
    UPLOADING_NAME,
    Manifest,
    ManifestError,
    ShardEntry,
    read_manifest,
    write_manifest,
)
from data_prep.format.storage import RemotePath
from data_prep.format.stores import StorageError
from data_prep.write.shard import shard_name

_LOG_NAME = "uploaded.txt"
_OUR_OBJECTS = re.compile(
    r"shard-\d{6,}\.(tar|index\.npy)|manifest\.json|rejected\.jsonl|statistics\.json|"
    r"uploading\.(txt|sha256)"
)


class Upload:
    """The upload of one set.

    Args:
        place: URL of the set.
        partial: local folder that shards are written into.
        overwrite: whether to replace what is at the URL.
    """

    def __init__(self, place: RemotePath, partial: Path, *, overwrite: bool) -> None:
        self.place = place
        self._partial, self._overwrite = partial, overwrite
        self._log = _Log(partial / _LOG_NAME)
        self._present: dict[str, int] = {}  # name → bytes
        self._owner_run = self._owner_machine = ""
        self._is_claimed = False

    @property
    def _is_ours(self) -> bool:
        """Whether this run uploaded the objects at the URL."""
        return self._log.run is not None and self._owner_run == self._log.run

    def check_target(self) -> None:
        """Check that the URL is empty, belongs to this run, or may be replaced.

        Raises:
            StorageError: the store does not answer, or the URL holds other files.
            ManifestError: the URL holds a manifest that cannot be read.
        """
        self.reload_log()
        self._present = self.place.list_sizes()
        self._owner_run, self._owner_machine = self._read_note()
        self._refuse_other_objects()
        if MANIFEST_NAME in self._present:
            refuse_foreign_shards(read_manifest(self.place))
        if not self._present or self._is_ours or self._overwrite:
            return
        if self._owner_run:
            raise StorageError(
                f"{self.place} holds the unfinished shards of another run, on the machine "
                f"{self._owner_machine}. Resume that run there with the same --staging folder, "
                "give an empty prefix, or replace the shards with --overwrite."
            )
        raise StorageError(
            f"{self.place} holds shards of another set ({min(self._present)}). Give an empty "
            "prefix, or replace them with --overwrite."
        )

    def claim(self) -> None:
        """Remove objects that may be replaced, and mark the URL as belonging to this run.

        Raises:
            StorageError: the store does not answer, or the URL now holds other files.
        """
        if self._is_claimed:
            return
        if not self._is_ours:
            self.check_target()
        if MANIFEST_NAME in self._present:
            (self.place / MANIFEST_NAME).unlink(missing_ok=True)
        if not self._is_ours:
            self.place.remove_objects(sorted(set(self._present) - {MANIFEST_NAME, UPLOADING_NAME}))
            self._present = {}
            self._owner_run = self._log.begin()
            note = f"{self._owner_run}\n{platform.node()}\n"
            (self.place / UPLOADING_NAME).write_bytes(note.encode())
        self._is_claimed = True

    def reload_log(self) -> None:
        """Read the local log again, which may have changed since."""
        self._log.read()

    def has_shard(self, entry: ShardEntry, position: int) -> bool:
        """Return whether a shard is at the URL under the name of that position in the set."""
        name = shard_name(position)
        return (
            self._is_ours
            and self._log.has(name, entry.sha256)
            and self._present.get(name) == entry.bytes
            and index_name(name) in self._present
        )

    def upload_shard(self, entry: ShardEntry, position: int, sent: Tick = lambda _: None) -> None:
        """Upload a finished shard and remove it locally; thread-safe.

        Args:
            entry: the shard, with its local name.
            position: position of the shard in the set.
            sent: called with the number of bytes sent.

        Raises:
            StorageError: the store does not answer, or the URL now belongs to another run.
        """
        assert self._is_claimed
        name = shard_name(position)
        if not self.has_shard(entry, position):
            self._check_ownership()
            self._log.forget(name)
            self._send(self._partial / entry.index, index_name(name), sent)
            self._send(self._partial / entry.name, name, sent)
            self._log.add(name, entry.sha256)
        (self._partial / entry.name).unlink(missing_ok=True)
        (self._partial / entry.index).unlink(missing_ok=True)

    def publish(self, manifest: Manifest, rejected: Path) -> Manifest:
        """Upload the list of rejected images and the manifest, which completes the set.

        Args:
            manifest: manifest of the set.
            rejected: local file of rejected images, if there are any.

        Raises:
            StorageError: the store does not answer, lacks shards, or the URL holds other files.
        """
        self.claim()
        self._check_ownership()
        self._present = self.place.list_sizes()
        self._refuse_other_objects()
        manifest = replace(manifest, folder=self.place)
        _check_lengths(manifest, self._present, "Run the same command again to resume.")
        wanted = {name for shard in manifest.shards for name in (shard.name, shard.index)}
        if manifest.rejected:
            self._send(rejected, rejected.name, lambda _: None)
            wanted.add(rejected.name)
        self.place.remove_objects(sorted(set(self._present) - wanted - {UPLOADING_NAME}))
        write_manifest(manifest)
        (self.place / UPLOADING_NAME).unlink(missing_ok=True)
        return manifest

    def _send(self, path: Path, name: str, sent: Tick) -> None:
        (self.place / name).upload(path, sent)
        length, there = path.stat().st_size, (self.place / name).stat().st_size
        if there != length:
            raise StorageError(
                f"{self.place / name} has {there:,} of the {length:,} bytes sent. Run the same "
                "command again to resume."
            )
        self._present[name] = there

    def _refuse_other_objects(self) -> None:
        foreign = [name for name in sorted(self._present) if not _OUR_OBJECTS.fullmatch(name)]
        if foreign:
            raise StorageError(
                f"{self.place} holds other files ({', '.join(foreign[:3])}). Give an empty "
                "prefix, or remove them."
            )

    def _check_ownership(self) -> None:
        run, machine = self._read_note()
        if run != self._log.run:
            where = f", on the machine {machine}" if machine else ""
            raise StorageError(
                f"{self.place} was taken over by another run{where}. Give each run its own prefix."
            )

    def _read_note(self) -> tuple[str, str]:
        """Return the run and the machine in the note at the URL, "" if there is none."""
        try:
            lines = (self.place / UPLOADING_NAME).read_bytes().decode(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        run, machine, *_ = [*lines, "", ""]
        return run, machine


def refuse_foreign_shards(manifest: Manifest) -> None:
    """Check that data-prep wrote the shards of a set, rather than only indexing them.

    Raises:
        StorageError: someone else wrote them, so they must not be replaced.
    """
    if "source" not in manifest.options:
        raise StorageError(
            f"{manifest.folder} holds tars that data-prep did not write. Give an empty or new "
            "folder."
        )


def check_uploaded(manifest: Manifest) -> None:
    """Check that a set in a store has all its shards, by length, and remove a left-over note.

    Raises:
        ManifestError: shards are missing.
        StorageError: the store does not answer.
    """
    assert isinstance(manifest.folder, RemotePath)
    present = manifest.folder.list_sizes()
    try:
        _check_lengths(manifest, present, "Restore it, or write the set again with --overwrite.")
    except StorageError as error:
        raise ManifestError(str(error)) from None
    if UPLOADING_NAME in present:  # from a run killed just before its end
        (manifest.folder / UPLOADING_NAME).unlink(missing_ok=True)


def _check_lengths(manifest: Manifest, present: dict[str, int], remedy: str) -> None:
    for shard in manifest.shards:
        if present.get(shard.name) != shard.bytes or shard.index not in present:
            raise StorageError(
                f"{manifest.folder} lacks {shard.name} or its index, or its length differs. "
                f"{remedy}"
            )


class _Log:
    """Log of uploads: one line for the run, then one per object.

    Of several lines with the same name the last counts. Thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.run: str | None = None
        self._path, self._lock = path, threading.Lock()
        self._hash_files: dict[str, str] = {}

    def read(self) -> None:
        """Read the log of an earlier run, if there is one."""
        self.run, self._hash_files = None, {}
        try:
            text = self._path.read_text("ascii")
        except FileNotFoundError:
            return
        self.run, *lines = text.splitlines()
        for line in lines:  # a line cut off by a kill has no valid digest
            name, _, digest = line.partition(" ")
            self._hash_files[name] = digest

    def begin(self) -> str:
        """Start a new log with a new run name, and return the name."""
        self.run, self._hash_files = secrets.token_hex(16), {}
        atomic_write_bytes(self._path, self.run.encode("ascii"))
        return self.run

    def has(self, name: str, digest: str) -> bool:
        return self._hash_files.get(name) == digest

    def add(self, name: str, digest: str) -> None:
        with (
            self._lock,
            name_in_errors(self._path),
            self._path.open("a", encoding="ascii") as file,
        ):
            file.write(f"\n{name} {digest}")
            file.flush()
            os.fsync(file.fileno())
            self._hash_files[name] = digest

    def forget(self, name: str) -> None:
        """Record that an object is about to be replaced."""
        if name in self._hash_files:
            self.add(name, "-")
