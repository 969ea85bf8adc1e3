"""Shards at URLs or written by commands: fetched whole into a cache, or read by ranges."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.format.manifest import Manifest, ShardEntry
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import RemotePath
from simmim.data.datasets.cache import DEFAULT_CACHE_BYTES, ShardCache, default_cache_folder
from simmim.data.datasets.retry import ShardUnavailableError
from simmim.data.order.order import BLOCK_SAMPLES, WHOLE_SHUFFLE_LIMIT
from simmim.data.order.source import DataError

SMALL_SHARE = 0.1
"""Share of selected samples below which `auto` reads by ranges."""


@dataclass(frozen=True, kw_only=True)
class RemoteReading:
    """How shards at a URL are read; local shards are read in place."""

    mode: Literal["auto", "shards", "ranges"] = "auto"
    """`shards` fetches and verifies whole shards, `ranges` fetches single samples, unverified;
    `auto` uses ranges if the cache cannot hold the shards that are shuffled together."""
    cache_dir: Path | None = None
    """Folder of fetched shards; None is a folder in the user's cache directory."""
    cache_bytes: int = DEFAULT_CACHE_BYTES
    """Size limit of the cache."""
    attempts: int = 8
    """Attempts per request before it fails."""
    allow_pipe: bool = False
    """Whether to run commands in the manifest whose output are the shards."""
    slots: int = 64
    """Slots of the order, which determine how many shards are shuffled together."""
    sets: int = 1
    """Number of datasets in the mixture, which share the cache equally."""

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "attempts", "slots", "sets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")

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
        reason = (
            "it does not exist; restore it"
            if isinstance(error, FileNotFoundError)
            else str(error).rstrip(".")
        )
        return f"shard {self.source} cannot be read: {reason}"
