"""A size-limited cache of fetched shards, shared by all processes of a machine."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from data_prep.format.manifest import ShardEntry
from simmim.data.order.source import DataError

DEFAULT_CACHE_BYTES = 64 * 2**30
"""Default size limit of the cache."""

_POLL_SECONDS = 0.05
_TRIES = 3


class ByteSource(Protocol):
    """Where the bytes of a shard are fetched from."""

    def blocks(self, start: int = 0) -> Iterable[bytes]:
        """Yield the bytes from offset `start`."""
        ...


def default_cache_folder() -> Path:
    """Return the shard folder in the user's cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "simmim" / "shards"


class ShardCache:
    """At most `limit` bytes of whole shards in a folder; the least recently read are evicted first.

    Shards are named by their checksum, fetched to a partial file, verified and renamed. Locks keep
    two processes from fetching the same shard; an interrupted fetch resumes where it stopped.
    Files are closed between reads, so evicted shards free their space at once.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DataError(
                f"the shard cache {folder} cannot be created ({error.strerror}): choose another"
                " folder with data.cache_dir."
            ) from None

    def read(self, entry: ShardEntry, source: ByteSource, offset: int, size: int) -> bytes:
        """Return bytes of a shard, which is fetched first if it is not cached.

        Raises:
            DataError: the shard does not fit into the cache, or differs from its manifest.
            OSError, ValueError: it cannot be fetched.
        """
        while True:
            try:
                file = os.open(self._path(entry), os.O_RDONLY)
            except FileNotFoundError:
                self.fetch(entry, source)
                continue
            try:
                os.utime(file)  # marks it as read last, for eviction
                return os.pread(file, size, offset)
            finally:
                os.close(file)

    def fetch(self, entry: ShardEntry, source: ByteSource) -> None:
        """Fetch a shard into the cache unless it is there. Raises as `read` does."""
        if entry.bytes > self.limit:
            raise DataError(
                f"shard {entry.name} has {entry.bytes:,} bytes, but the cache in {self.folder} is"
                f" limited to {self.limit:,}: raise data.cache_bytes, or set data.remote to ranges."
            )
        with self._locked(self._lock_name(entry.sha256)):
            for _ in range(_TRIES):
                if self._path(entry).exists() or self._download(entry, source):
                    return
        raise DataError(
            f"shard {entry.name} fetched from {source} does not match its manifest: its SHA-256"
            f" differed {_TRIES} times; write it again or run `data-prep verify`."
        )

    def _download(self, entry: ShardEntry, source: ByteSource) -> bool:
        """Fetch the missing bytes of a shard; return whether its checksum matches."""
        partial = self._make_room(entry)
        with partial.open("ab") as file:
            if file.tell() < entry.bytes:
                for block in source.blocks(file.tell()):
                    file.write(block)
                    if file.tell() > entry.bytes:
                        break  # the source may be endless
        with partial.open("rb") as file:
            matches = _checksum(file) == entry.sha256
        if matches:
            partial.replace(self._path(entry))
        else:
            partial.unlink()
        return matches

    def _make_room(self, entry: ShardEntry) -> Path:
        """Evict until the shard fits, and reserve its space; return the partial file."""
        partial = self.folder / f"{entry.sha256}.{entry.bytes}.partial"
        while True:
            with self._locked("room.lock"):
                if self._evict(entry.bytes, partial):
                    partial.touch()
                    return partial
            time.sleep(_POLL_SECONDS)  # others are fetching; their shards can be evicted later

    def _evict(self, room: int, partial: Path) -> bool:
        """Evict the least recently read shards until there is room; return whether there is."""
        known = []
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".partial") and path != partial:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # renamed meanwhile, and counted under its other name
                part = path.suffix == ".partial"
                size = int(path.name.split(".")[1]) if part else status.st_size
                known.append((status.st_mtime_ns, size, path))
        used = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if used + room <= self.limit:
                break
            if path.suffix == ".tar" or self._is_abandoned(path):
                path.unlink(missing_ok=True)
                used -= size
        return used + room <= self.limit

    def _is_abandoned(self, partial: Path) -> bool:
        """Return whether no process is fetching into this file."""
        with (self.folder / self._lock_name(partial.name)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _path(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.sha256}.tar"

    @staticmethod
    def _lock_name(checksum: str) -> str:
        return f"{checksum[:3]}.lock"  # 4,096 of them, never deleted

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _checksum(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
