"""Which samples each batch of a rank holds: address lists, made before anything is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from simmim.data.datasets.mixture import Order
from simmim.data.order.order import Address


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The addresses of each micro-batch of one rank between two cursors."""

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
                f" that each of {self.world} processes takes of a global batch of"
                f" {self.batch_size}"
            )
        if self.start > self.stop or (self.stop - self.start) % self.batch_size:
            raise ValueError(
                f"from cursor {self.start} to {self.stop} is no whole number of batches of"
                f" {self.batch_size} samples"
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
class EvaluationPlan:
    """The addresses of each batch of one rank: every sample once over all ranks, in order."""

    sizes: Sequence[int]
    batch_size: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world:
            raise ValueError(
                f"batch_size is {self.batch_size} and rank {self.rank} of {self.world};"
                " the batch must hold at least 1 sample and ranks count from 0"
            )

    def __len__(self) -> int:
        return sum(1 for part in self._ranges() if part)

    def __iter__(self) -> Iterator[list[Address]]:
        places = ((shard, row) for shard, size in enumerate(self.sizes) for row in range(size))
        passed = 0
        for part in self._ranges():
            if part:
                for _ in range(part.start - passed):
                    next(places)
                yield [Address(0, *next(places)) for _ in part]
                passed = part.stop

    def _ranges(self) -> Iterator[range]:
        """Yield which samples, counted through all shards, this rank takes of each batch."""
        total = sum(self.sizes)
        for first in range(0, total, self.batch_size):
            count = min(self.batch_size, total - first)
            yield range(
                first + count * self.rank // self.world,
                first + count * (self.rank + 1) // self.world,
            )
