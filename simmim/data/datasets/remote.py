"""Shards that lie elsewhere: whole ones through a cache, or single samples by range."""

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.format.manifest import Manifest, ShardEntry
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import RemotePath
from simmim.data.datasets.cache import DEFAULT_CACHE_BYTES, ShardCache, default_cache_folder
from simmim.data.datasets.retry import ShardAmissError
from simmim.data.order.errors import DataError
from simmim.data.order.order import BLOCK_SAMPLES, WHOLE_SHUFFLE_LIMIT, Address

SMALL_SHARE = 0.1
"""Share of the samples below which `auto` reads a choice of samples by range."""

MOST_SHARDS_AHEAD = 8
"""Shards that are fetched before a batch needs them, at most."""

_MOST_BATCHES_AHEAD = 64


@dataclass(frozen=True, kw_only=True)
class RemoteReading:
    """How shards at a URL are read; what lies on this machine is read in place."""

    mode: Literal["auto", "shards", "ranges"] = "auto"
    """`shards` fetches whole shards and checks them, `ranges` single samples, unchecked; `auto`
    takes ranges where the cache cannot hold the shards that are shuffled together."""
    cache_dir: Path | None = None
    """Folder of fetched shards; None is one in the user's cache directory."""
    cache_bytes: int = DEFAULT_CACHE_BYTES
    """Most bytes of shards in it."""
    attempts: int = 8
    """Times that a request is made before it counts as failed."""
    allow_pipe: bool = False
    """Whether shards may be what commands write that the manifest names; these are then run."""
    slots: int = 64
    """Slots of the order, which tell how many shards are shuffled together."""
    sets: int = 1
    """Sets of shards that are mixed, and so share the cache evenly."""

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "attempts", "slots", "sets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")

    def cache_for(self, manifest: Manifest, share: float) -> ShardCache | None:
        """Return the cache for a set, of which this share of samples is read; None for ranges."""
        fits = self.sets * bytes_in_use(manifest, self.slots) <= self.cache_bytes
        whole = self.mode == "shards" or (self.mode == "auto" and fits and share >= SMALL_SHARE)
        return self.cache if whole else None

    @property
    def cache(self) -> ShardCache:
        """The cache of whole shards."""
        return ShardCache(self.cache_dir or default_cache_folder(), self.cache_bytes)


def bytes_in_use(manifest: Manifest, slots: int) -> int:
    """Return the bytes of the shards that are shuffled together while an epoch is read."""
    total = sum(shard.bytes for shard in manifest.shards)
    if manifest.samples <= WHOLE_SHUFFLE_LIMIT:
        return total
    block = BLOCK_SAMPLES * len(manifest.shards) // manifest.samples + 2
    return min(total, slots * block * max(shard.bytes for shard in manifest.shards))


class RemoteShard:
    """The bytes of one shard at a URL, or that a command writes, which always goes by the cache."""

    def __init__(
        self, source: RemotePath | PipedFile, entry: ShardEntry, cache: ShardCache | None
    ) -> None:
        self.source = source
        self.entry = entry
        self.cache = cache

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the shard. Raises DataError naming it where it cannot be had."""
        try:
            if self.cache is None:
                assert isinstance(self.source, RemotePath)
                return self.source.read_range(offset, size)
            return self.cache.read(self.entry, self.source, offset, size)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise ShardAmissError(self._describe(error)) from None
        except (OSError, ValueError) as error:
            raise DataError(self._describe(error)) from None

    def fetch(self) -> None:
        """Bring the whole shard into the cache, where there is one; raises as `read` does."""
        if self.cache is not None:
            try:
                self.cache.fetch(self.entry, self.source)
            except DataError:
                raise
            except (OSError, ValueError) as error:
                raise DataError(self._describe(error)) from None

    def close(self) -> None:
        """Nothing is held open."""

    def _describe(self, error: Exception) -> str:
        reason = "it is gone; bring it back" if isinstance(error, FileNotFoundError) else str(error)
        return f"shard {self.source} cannot be read: {reason}"


class AheadOfBatches:
    """The batches of a plan, while the shards that later ones need are fetched by a thread.

    Only shards of this plan are fetched, `most` ahead at a time, in the order of their use.
    """

    def __init__(
        self,
        plan: Iterable[Sequence[Address]],
        fetch: Callable[[int], None],
        *,
        most: int = MOST_SHARDS_AHEAD,
    ) -> None:
        self.plan = plan
        self.fetch = fetch
        self.most = most

    def __iter__(self) -> Iterator[Sequence[Address]]:
        wanted: queue.Queue[int | None] = queue.Queue()
        stop = threading.Event()
        thread = threading.Thread(target=self._serve, args=(wanted, stop), daemon=True)
        thread.start()
        try:
            yield from self._look_ahead(wanted)
        finally:
            stop.set()
            wanted.put(None)

    def _look_ahead(self, wanted: "queue.Queue[int | None]") -> Iterator[Sequence[Address]]:
        batches = iter(self.plan)
        coming: deque[Sequence[Address]] = deque()
        recent: OrderedDict[int, None] = OrderedDict()
        while True:
            while len(coming) < _MOST_BATCHES_AHEAD and wanted.qsize() < self.most:
                batch = next(batches, None)
                if batch is None:
                    break
                coming.append(batch)
                for shard in dict.fromkeys(address.shard for address in batch):
                    if shard not in recent:
                        wanted.put(shard)
                    recent[shard] = None
                    recent.move_to_end(shard)
                while len(recent) > 4 * self.most:
                    recent.popitem(last=False)
            if not coming:
                batch = next(batches, None)
                if batch is None:
                    return
                coming.append(batch)
            yield coming.popleft()

    def _serve(self, wanted: "queue.Queue[int | None]", stop: threading.Event) -> None:
        while (shard := wanted.get()) is not None and not stop.is_set():
            try:
                self.fetch(shard)
            except (ValueError, OSError):
                continue  # whoever needs the shard meets the same, and tells of it
