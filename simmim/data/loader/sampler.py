"""Batch samplers of one rank: lists of addresses, with their shards fetched ahead."""

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from simmim.data.order.order import Address, Order

MAX_SHARDS_AHEAD = 8
"""Maximum number of shards fetched before a batch needs them."""

_MAX_BATCHES_AHEAD = 64


@dataclass(frozen=True, kw_only=True)
class TrainingSampler:
    """The addresses of every micro-batch of one rank between two cursors."""

    order: Order
    batch_size: int
    accumulation: int
    rank: int
    world: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        self.order.check_batch(self.batch_size, self.world)
        share = self.batch_size // self.world
        if self.accumulation < 1 or share % self.accumulation:
            raise ValueError(
                f"accumulation is {self.accumulation}, which does not divide the {share} samples"
                f" per process of a global batch of {self.batch_size} on {self.world} processes."
            )
        if self.start > self.stop or (self.stop - self.start) % self.batch_size:
            raise ValueError(
                f"cursors {self.start} to {self.stop} are not a whole number of batches of"
                f" {self.batch_size} samples."
            )

    def __len__(self) -> int:
        return (self.stop - self.start) // self.batch_size * self.accumulation

    def __iter__(self) -> Iterator[list[Address]]:
        micro = self.batch_size // self.world // self.accumulation
        for position in range(self.start, self.stop, self.batch_size):
            part = self.order.batch(position, self.batch_size, self.rank, self.world)
            for first in range(0, len(part), micro):
                yield part[first : first + micro]


@dataclass(frozen=True, kw_only=True)
class EvaluationSampler:
    """The addresses of every batch of one rank; all ranks together visit each sample once."""

    sizes: Sequence[int]
    batch_size: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world:
            raise ValueError(
                f"batch_size is {self.batch_size} and rank {self.rank} of {self.world};"
                " batch_size must be at least 1, and rank from 0 to the number of ranks - 1."
            )

    def __len__(self) -> int:
        return sum(1 for part in self._ranges() if part)

    def __iter__(self) -> Iterator[list[Address]]:
        samples = ((shard, row) for shard, size in enumerate(self.sizes) for row in range(size))
        passed = 0
        for part in self._ranges():
            if part:
                for _ in range(part.start - passed):
                    next(samples)
                yield [Address(0, *next(samples)) for _ in part]
                passed = part.stop

    def _ranges(self) -> Iterator[range]:
        """Yield this rank's range of each batch, counted over all samples."""
        total = sum(self.sizes)
        for first in range(0, total, self.batch_size):
            count = min(self.batch_size, total - first)
            yield range(
                first + count * self.rank // self.world,
                first + count * (self.rank + 1) // self.world,
            )


class ShardPrefetcher:
    """The batches of a sampler, while a thread fetches the shards of later ones.

    Shards are fetched in the order of their use, at most `most` ahead.
    """

    def __init__(
        self,
        sampler: Iterable[Sequence[Address]],
        fetch: Callable[[int], None],
        *,
        most: int = MAX_SHARDS_AHEAD,
    ) -> None:
        self.sampler = sampler
        self.fetch = fetch
        self.most = most

    def __iter__(self) -> Iterator[Sequence[Address]]:
        wanted: queue.Queue[int | None] = queue.Queue()
        stop = threading.Event()
        thread = threading.Thread(target=self._fetch_wanted, args=(wanted, stop), daemon=True)
        thread.start()
        try:
            yield from self._batches(wanted)
        finally:
            stop.set()
            wanted.put(None)

    def _batches(self, wanted: "queue.Queue[int | None]") -> Iterator[Sequence[Address]]:
        batches = iter(self.sampler)
        coming: deque[Sequence[Address]] = deque()
        recent: OrderedDict[int, None] = OrderedDict()
        while True:
            while len(coming) < _MAX_BATCHES_AHEAD and wanted.qsize() < self.most:
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

    def _fetch_wanted(self, wanted: "queue.Queue[int | None]", stop: threading.Event) -> None:
        while (shard := wanted.get()) is not None and not stop.is_set():
            try:
                self.fetch(shard)
            except (ValueError, OSError):
                continue  # reading the shard will raise the same error, and report it
