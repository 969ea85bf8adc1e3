"""Shards at URLs or written by commands: fetched whole into a cache, or read by ranges."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from data_prep.bounds import Count, check_bounds
from data_prep.format.manifest import Manifest, ShardEntry
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import ATTEMPTS, RemotePath
from simmim.data.datasets.image_set import ShardUnavailableError
from simmim.data.order.order import BLOCK_SAMPLES, WHOLE_SHUFFLE_LIMIT
from simmim.data.order.source import DataError
from simmim.environment import process_environment

DEFAULT_CACHE_BYTES = 64 * 2**30
"""Default size limit of the cache."""

_POLL_SECONDS = 0.05
_TRIES = 3

SMALL_SHARE = 0.1
"""Fraction of selected samples below which `auto` reads by ranges."""


class ByteSource(Protocol):
    """Source from which the bytes of a shard are fetched."""

    def blocks(self, start: int = 0) -> Iterable[bytes]:
        """Yield the bytes from offset `start`."""
        ...


def default_cache_folder() -> Path:
    """Return the shard folder in the user's cache directory."""
    return process_environment().cache_folder / "simmim" / "shards"


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


@dataclass(frozen=True, kw_only=True)
class RemoteReading:
    """How shards at a URL are read; local shards are read in place."""

    mode: Literal["auto", "shards", "ranges"] = "auto"
    """`shards` fetches and verifies whole shards, `ranges` fetches single samples, unverified;
    `auto` uses ranges if the cache cannot hold the shards that are shuffled together."""
    cache_dir: Path | None = None
    """Folder of fetched shards; None is a folder in the user's cache directory."""
    cache_bytes: Count = DEFAULT_CACHE_BYTES
    """Size limit of the cache."""
    attempts: Count = ATTEMPTS
    """Attempts per request before it fails."""
    allow_pipe: bool = False
    """Whether to run commands in the manifest whose output are the shards."""
    slots: Count = 64
    """Slots of the order, which determine how many shards are shuffled together."""
    sets: Count = 1
    """Number of datasets in the mixture, which share the cache equally."""

    def __post_init__(self) -> None:
        check_bounds(self)

    def cache_for(self, manifest: Manifest, share: float) -> ShardCache | None:
        """Return the cache for a dataset of which this share is read; None to read by ranges."""
        fits = self.sets * bytes_in_use(manifest, self.slots) <= self.cache_bytes
        whole = self.mode == "shards" or (self.mode == "auto" and fits and share >= SMALL_SHARE)
        return self.cache if whole else None

    @property
    def cache(self) -> ShardCache:
        """The cache of whole shards."""
        return ShardCache(self.cache_dir or default_cache_folder(), self.cache_bytes)


def bytes_in_use(manifest: Manifest, slots: int) -> int:
    """Return the total size of the shards that are shuffled together."""
    total = sum(shard.bytes for shard in manifest.shards)
    if manifest.samples <= WHOLE_SHUFFLE_LIMIT:
        return total
    block = BLOCK_SAMPLES * len(manifest.shards) // manifest.samples + 2
    return min(total, slots * block * max(shard.bytes for shard in manifest.shards))


class RemoteShard:
    """The bytes of a shard at a URL, or written by a command, which is always cached."""

    def __init__(
        self, source: RemotePath | PipedFile, entry: ShardEntry, cache: ShardCache | None
    ) -> None:
        self.source = source
        self.entry = entry
        self.cache = cache

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the shard. Raises DataError naming it if it cannot be read."""
        try:
            if self.cache is None:
                assert isinstance(self.source, RemotePath)
                return self.source.read_range(offset, size)
            return self.cache.read(self.entry, self.source, offset, size)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise ShardUnavailableError(self._describe(error)) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{self._describe(error)}.") from None

    def fetch(self) -> None:
        """Fetch the shard into the cache, if there is one. Raises as `read` does."""
        if self.cache is not None:
            try:
                self.cache.fetch(self.entry, self.source)
            except DataError:
                raise
            except (OSError, ValueError) as error:
                raise DataError(f"{self._describe(error)}.") from None

    def close(self) -> None:
        """Do nothing: no file is kept open."""

    def _describe(self, error: Exception) -> str:
        reason = str(error).rstrip(".")
        if isinstance(error, FileNotFoundError):
            reason = "it does not exist; restore it"
        elif reason.startswith(str(self.source)):
            return f"shard {reason}"
        return f"shard {self.source} cannot be read: {reason}"
