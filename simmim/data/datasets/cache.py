"""A bounded folder of shards fetched from elsewhere, shared by all processes of a machine."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from data_prep.format.manifest import ShardEntry
from simmim.data.order.errors import DataError

DEFAULT_CACHE_BYTES = 64 * 2**30
"""Most bytes of shards that a cache holds unless told otherwise."""

_SECONDS_BETWEEN_LOOKS = 0.05
_TRIES = 3


class Source(Protocol):
    """Where the bytes of a shard come from."""

    def blocks(self, start: int = 0) -> Iterable[bytes]:
        """Yield the bytes from `start` on."""
        ...


def default_cache_folder() -> Path:
    """Return the folder for shards in the user's cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "simmim" / "shards"


class ShardCache:
    """At most `limit` bytes of whole shards in a folder, the least recently read go first.

    Shards are named by their checksum, fetched aside, compared with it and renamed. A lock for
    each keeps two processes from fetching the same; a fetch that was cut off goes on where it
    stopped. Nothing is held open between reads, so what was evicted frees its space at once.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DataError(
                f"the cache of shards {folder} cannot be made ({error.strerror}): name another"
                " folder with data.cache_dir"
            ) from None

    def read(self, entry: ShardEntry, source: Source, offset: int, size: int) -> bytes:
        """Return bytes of a shard, which is fetched first where it is not there.

        Raises:
            DataError: the shard does not fit into the cache, or is not what its manifest says.
            OSError, ValueError: it cannot be fetched.
        """
        while True:
            try:
                file = os.open(self._path(entry), os.O_RDONLY)
            except FileNotFoundError:
                self.fetch(entry, source)
                continue
            try:
                os.utime(file)  # read just now, says the order of eviction
                return os.pread(file, size, offset)
            finally:
                os.close(file)

    def fetch(self, entry: ShardEntry, source: Source) -> None:
        """Bring a shard into the cache unless it is there; raises as `read` does."""
        if entry.bytes > self.limit:
            raise DataError(
                f"shard {entry.name} has {entry.bytes:,} bytes and the cache in {self.folder} holds"
                f" {self.limit:,}: raise data.cache_bytes, or read by ranges with data.remote"
            )
        with self._locked(self._lock_name(entry.sha256)):
            for _ in range(_TRIES):
                if self._path(entry).exists() or self._download(entry, source):
                    return
        raise DataError(
            f"shard {entry.name} as fetched from {source} is not what its manifest says: its"
            f" SHA-256 differed {_TRIES} times; make it again or run `data-prep verify`"
        )

    def _download(self, entry: ShardEntry, source: Source) -> bool:
        """Fetch what is missing of a shard; tell whether its checksum is right."""
        partial = self._make_room(entry)
        with partial.open("ab") as file:
            if file.tell() < entry.bytes:
                for block in source.blocks(file.tell()):
                    file.write(block)
                    if file.tell() > entry.bytes:
                        break  # of a source that may never end
        with partial.open("rb") as file:
            right = _checksum(file) == entry.sha256
        if right:
            partial.replace(self._path(entry))
        else:
            partial.unlink()
        return right

    def _make_room(self, entry: ShardEntry) -> Path:
        """Evict until the shard fits, and reserve its room; return where it is fetched to."""
        partial = self.folder / f"{entry.sha256}.{entry.bytes}.partial"
        while True:
            with self._locked("room.lock"):
                if self._evict(entry.bytes, partial):
                    partial.touch()
                    return partial
            time.sleep(_SECONDS_BETWEEN_LOOKS)  # others are fetching, and what they have can go

    def _evict(self, room: int, partial: Path) -> bool:
        """Remove what was read longest ago until there is room; tell whether there is."""
        known = []
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".partial") and path != partial:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # renamed in the meantime, and counted under one of its names
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
        """Tell whether nobody is fetching into this file."""
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
        return f"{checksum[:3]}.lock"  # 4,096 of them, which are kept

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
