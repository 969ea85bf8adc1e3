"""The order of samples of several datasets mixed by weight.

The global stream consists of turns, each of one sample per slot. A pattern of fixed length,
repeated along the stream, assigns each position a dataset: in proportion to the weights, and as
evenly spread as possible. Each dataset is traversed in its own order, epoch after epoch, as if it
were alone. So a cursor is still the whole state, and every batch holds each dataset in proportion,
to within a few samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simmim.data.order.order import Address, SampleOrder, check_batch, slots_of, turns_of

PERIODS = (10_007, 10_009)
"""Lengths of the pattern, both prime: the first that does not divide the number of slots, so that
every slot passes through all of it."""


class MixedOrder:
    """The endless sequence of samples of several datasets; see `SampleOrder` for a single one.

    An epoch has as many samples as the epochs of all datasets together, so a dataset of a large
    weight is traversed more than once. The epoch of an address counts within its own dataset.

    Args:
        sets: shard sizes of each dataset.
        weights: weight of each dataset, above 0.
        seed: seed of the first dataset's order; those of the others follow.
        slots: slots of each order.

    Raises:
        ValueError: a dataset has fewer samples than slots, or a weight too small to be drawn.
    """

    def __init__(
        self, sets: Sequence[Sequence[int]], weights: Sequence[float], *, seed: int, slots: int
    ) -> None:
        self.orders = [
            SampleOrder(sizes, seed=seed + number, slots=slots) for number, sizes in enumerate(sets)
        ]
        self.slots = slots
        self.shard_sizes = np.concatenate([order.shard_sizes for order in self.orders])
        self._firsts = np.cumsum([0, *(len(order.shard_sizes) for order in self.orders)])
        self.pattern = pattern(weights, next(period for period in PERIODS if slots % period))
        self._slots: dict[int, tuple[NDArray[np.int16], NDArray[np.int32]]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples per epoch."""
        return sum(order.samples_per_epoch for order in self.orders)

    def check_batch(self, batch_size: int, world: int = 1) -> None:
        """Raise ValueError unless this global batch can be divided among `world` ranks."""
        check_batch(batch_size, world, self.slots)

    def batch(self, position: int, batch_size: int, rank: int = 0, world: int = 1) -> list[Address]:
        """Return the part of a global batch that belongs to `rank`; see `SampleOrder.batch`."""
        self.check_batch(batch_size, world)
        turns = turns_of(position, batch_size, self.slots)
        owned = slots_of(rank, world, self.slots)
        return [address for slot in owned for address in self._slot_addresses(slot, turns)]

    def _slot_addresses(self, slot: int, turns: NDArray[np.int64]) -> list[Address]:
        """Return the samples of a slot at these turns, each from the dataset drawn there."""
        chosen, drawn = self._slot(slot)
        periods, places = np.divmod(turns, len(self.pattern))
        found: list[Address] = [Address(0, 0, 0)] * len(turns)
        for number, order in enumerate(self.orders):
            here = np.flatnonzero(chosen[places] == number)
            # How often the dataset was drawn before: in whole periods, and since.
            earlier = periods[here] * int(drawn[number, -1]) + drawn[number, places[here]]
            addresses = order.slot_addresses(slot, earlier)
            first = int(self._firsts[number])
            for place, (epoch, shard, sample) in zip(here.tolist(), addresses, strict=True):
                found[place] = Address(epoch, first + shard, sample)
        return found

    def _slot(self, slot: int) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
        """Return the pattern in the order of a slot's turns, and each dataset's cumulative draws.

        Shapes: (period,) and (datasets, period + 1).
        """
        if slot not in self._slots:
            period = len(self.pattern)
            chosen = self.pattern[(np.arange(period) * self.slots + slot) % period]
            drawn = np.zeros((len(self.orders), period + 1), dtype=np.int32)
            for number in range(len(self.orders)):
                drawn[number, 1:] = np.cumsum(chosen == number)
            self._slots[slot] = (chosen, drawn)
        return self._slots[slot]


def pattern(weights: Sequence[float], period: int) -> NDArray[np.int16]:
    """Return the dataset drawn at each of `period` positions, as evenly spread as possible.

    Raises ValueError if a weight is so small that its dataset would never be drawn.
    """
    shares = np.asarray(weights, dtype=np.float64) / float(np.sum(weights)) * period
    counts = np.floor(shares).astype(np.int64)
    left = period - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:left]] += 1  # the largest remainders
    if not counts.all():
        raise ValueError(
            f"a weight is below 1/{period:,} of the sum of weights, and its set would never be"
            " drawn: raise it, or remove the set."
        )
    moments = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    numbers = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return numbers[np.argsort(moments, kind="stable")]


Order = SampleOrder | MixedOrder
"""Which sample comes next, in one dataset or a mixture."""
