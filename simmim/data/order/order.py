"""The order of samples: a pure function of seed, epoch and shard sizes.

An epoch of up to 65,536 samples is one shuffle of them: a single slot, whose stream runs on from
epoch to epoch, so that no sample is left out and batches have any size. A larger epoch is a stream
of all samples that is cut into a fixed number of equal slots; a global batch takes the same number
of samples from every slot. Each rank takes a contiguous, equal part of the global batch. So the
global batches are the same on any number of ranks, and a rank reads only its own part of a large
set. The whole state is the cursor: the number of samples that all ranks together have consumed.

The samplers of torch and accelerate tie the order to the number of processes, and find a position
again by reading what came before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_prep.bounds import Count
from data_prep.format.text import count_noun
from simmim.data.order.randomness import shuffled

WHOLE_SHUFFLE_LIMIT = 65_536
"""Largest dataset whose epoch is a single shuffle of all samples."""

BLOCK_SAMPLES = 32_768
"""Samples of a slot that are shuffled together in larger datasets: a few shards."""

MAX_SLOTS = 64
"""Largest number of slots that is chosen for a dataset."""

PERIODS = (10_007, 10_009)
"""Lengths of the pattern, both prime: the first that does not divide the number of slots, so that
every slot passes through all of it."""


Slots: TypeAlias = Count | tuple[Count, ...]
"""Number of slots of a dataset or of each dataset of a mixture; or one number for each."""


class Address(NamedTuple):
    """A sample (shard, row) in an epoch."""

    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class EpochStream:
    """The concatenated shards of one epoch: `shards[i]` covers positions from `starts[i]`."""

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]
    shuffle: NDArray[np.int64] | None
    """Permutation of the whole epoch; None for larger datasets."""


def slots_for(batch_size: int, samples: int) -> int:
    """Return the largest divisor of the global batch that is at most 64 and at most `samples`."""
    limit = max(1, min(MAX_SLOTS, samples, batch_size))
    return next(slots for slots in range(limit, 0, -1) if batch_size % slots == 0)


def choose_slots(samples: Sequence[int], batch_size: int) -> Slots:
    """Return the slots of datasets with these numbers of samples: 1 unless one is large.

    A single number if it is the same for all datasets.
    """
    large = [count > WHOLE_SHUFFLE_LIMIT for count in samples]
    if not any(large):
        return 1
    most = slots_for(batch_size, min(count for count in samples if count > WHOLE_SHUFFLE_LIMIT))
    return most if all(large) else tuple(most if one else 1 for one in large)


def check_batch(batch_size: int, world: int, slots: int) -> None:
    """Raise ValueError unless slots and ranks divide a global batch."""
    if batch_size < 1 or batch_size % slots:
        raise ValueError(
            f"global batch size {batch_size} is not a multiple of the {slots} slots;"
            f" use {max(1, batch_size // slots) * slots} or another multiple."
        )
    if world < 1 or batch_size % world:
        legal = [count for count in range(1, batch_size + 1) if batch_size % count == 0]
        near = sorted(legal, key=lambda count: abs(count - world))[:4]
        raise ValueError(
            f"{count_noun(world, 'process', 'processes')} cannot share a global batch of"
            f" {batch_size} equally; use {', '.join(map(str, sorted(near)))} processes, or set"
            f" training.batch_size to a multiple of the number of processes."
        )


def turns_of(position: int, batch_size: int, slots: int) -> NDArray[np.int64]:
    """Return the turns of every slot in the global batch at cursor `position`.

    Raises ValueError if the cursor is between two turns.
    """
    if position < 0 or position % slots:
        raise ValueError(
            f"cursor {position} is not a multiple of the {slots} slots;"
            " resume with the batch size and slots that the run started with."
        )
    first = position // slots
    return np.arange(first, first + batch_size // slots)


def turns_of_rank(
    position: int, batch_size: int, rank: int, world: int, slots: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each slot in a rank's part of the global batch at cursor `position`, and its turns.

    The global batch is all turns of the first slot, then those of the next; a rank takes a
    contiguous part of it. Raises ValueError if sizes do not divide, or there is no such rank.
    """
    check_batch(batch_size, world, slots)
    turns = turns_of(position, batch_size, slots)
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; it must be from 0 to {world - 1}.")
    share = batch_size // world
    first, last = rank * share, (rank + 1) * share
    for slot in range(first // len(turns), -(-last // len(turns))):
        begin = slot * len(turns)
        yield slot, turns[max(0, first - begin) : last - begin]


class SampleOrder:
    """The endless sequence of samples over `shard_sizes` (number of samples in each shard).

    An epoch visits each sample at most once and skips fewer than `slots` of them: none of one slot.
    Raises ValueError if there are fewer samples than slots.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, slots: int = MAX_SLOTS) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.slots = slots
        self.samples = int(self.shard_sizes.sum())
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1.")
        if self.shard_sizes.ndim != 1 or bool((self.shard_sizes < 0).any()):
            raise ValueError("shard_sizes must be a flat sequence of counts, each at least 0.")
        if self.samples < slots:
            raise ValueError(
                f"{count_noun(self.samples, 'sample')} cannot fill {count_noun(slots, 'slot')};"
                f" use more images, or at most"
                f" {max(1, self.samples)} slots (a divisor of the global batch size)."
            )
        self._slot_length = self.samples // slots
        self._num_blocks = -(-self._slot_length // BLOCK_SAMPLES)
        self._epochs: dict[int, EpochStream] = {}
        self._blocks: dict[int, tuple[tuple[int, int], NDArray[np.int32]]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples per epoch: the largest multiple of `slots` available."""
        return self._slot_length * self.slots

    def check_batch(self, batch_size: int, world: int = 1) -> None:
        """Raise ValueError unless this global batch can be divided among `world` ranks."""
        check_batch(batch_size, world, self.slots)

    def batch(self, position: int, batch_size: int, rank: int = 0, world: int = 1) -> list[Address]:
        """Return the part of the global batch at cursor `position` that belongs to `rank`.

        The concatenated parts of ranks 0 … world - 1 are the same list for every `world`. The
        cursor is any multiple of `slots`. Raises ValueError if sizes do not divide.
        """
        parts = turns_of_rank(position, batch_size, rank, world, self.slots)
        return [address for slot, turns in parts for address in self.slot_addresses(slot, turns)]

    def slot_addresses(self, slot: int, turns: NDArray[np.int64]) -> list[Address]:
        """Return the samples of a slot at these turns, ascending; one sample per turn."""
        epochs, offsets = np.divmod(turns, self._slot_length)
        addresses: list[Address] = []
        for epoch in np.unique(epochs).tolist():
            addresses += self._addresses(epoch, slot, offsets[epochs == epoch])
        return addresses

    def _addresses(self, epoch: int, slot: int, offsets: NDArray[np.int64]) -> list[Address]:
        """Return the samples at these offsets of a slot."""
        stream = self._stream(epoch)
        if stream.shuffle is None:
            places = slot * self._slot_length + self._shuffled_in_blocks(epoch, slot, offsets)
        else:
            places = stream.shuffle[slot * self._slot_length + offsets]
        # An empty shard shares its start with the next one: side="right" takes the last of them.
        rows = np.searchsorted(stream.starts, places, side="right") - 1
        shards = stream.shards[rows].tolist()
        samples = (places - stream.starts[rows]).tolist()
        return [Address(epoch, *place) for place in zip(shards, samples, strict=True)]

    def _shuffled_in_blocks(
        self, epoch: int, slot: int, offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the offsets after shuffling, each from the same block."""
        edges = np.arange(self._num_blocks + 1) * self._slot_length // self._num_blocks
        blocks = np.searchsorted(edges, offsets, side="right") - 1
        replaced = np.empty_like(offsets)
        for block in np.unique(blocks).tolist():
            start, stop = int(edges[block]), int(edges[block + 1])
            here = blocks == block
            shuffle = self._block(epoch, slot, block, stop - start)
            replaced[here] = start + shuffle[offsets[here] - start]
        return replaced

    def _block(self, epoch: int, slot: int, block: int, size: int) -> NDArray[np.int32]:
        """Return the permutation of one block; the latest one of each slot is cached."""
        known = self._blocks.get(slot)
        if known is not None and known[0] == (epoch, block):
            return known[1]
        shuffle = shuffled(size, "block", self.seed, epoch, slot, block).astype(np.int32)
        self._blocks[slot] = ((epoch, block), shuffle)
        return shuffle

    def _stream(self, epoch: int) -> EpochStream:
        """Return the stream of an epoch; the two latest are cached."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._make_stream(epoch)
        return self._epochs[epoch]

    def _make_stream(self, epoch: int) -> EpochStream:
        if self.samples <= WHOLE_SHUFFLE_LIMIT:
            shards = np.arange(len(self.shard_sizes))
            shuffle = shuffled(self.samples, "epoch", self.seed, epoch)
        else:
            shards = shuffled(len(self.shard_sizes), "shards", self.seed, epoch)
            shuffle = None
        sizes = self.shard_sizes[shards]
        return EpochStream(shards, np.cumsum(sizes) - sizes, shuffle)


class StreamOrder(SampleOrder):
    """The endless samples of a stream; addresses number those of an epoch, in shard 0."""

    def __init__(self, samples: int) -> None:
        super().__init__([samples], seed=0, slots=1)

    def slot_addresses(self, slot: int, turns: NDArray[np.int64]) -> list[Address]:
        """Return the numbers of the samples at these turns; see `SampleOrder`."""
        assert slot == 0
        epochs, numbers = np.divmod(turns, self.samples)
        places = zip(epochs.tolist(), numbers.tolist(), strict=True)
        return [Address(epoch, 0, number) for epoch, number in places]


class MixedOrder:
    """The endless sequence of samples of several datasets; see `SampleOrder` for a single one.

    An epoch has as many samples as the epochs of all datasets together, so a dataset of a large
    weight is traversed more than once. The epoch of an address counts within its own dataset.

    Args:
        sets: shard sizes of each dataset.
        weights: weight of each dataset, above 0.
        seed: seed of the first dataset's order; those of the others follow.
        slots: slots of each order; or one number for each, of which those other than 1 are equal.
            A dataset of one slot is traversed by all slots of the others in turn.
        stream: whether the last dataset is a stream, which is of one slot.

    Raises:
        ValueError: a dataset has fewer samples than slots, or a weight too small to be drawn; or
            `slots` does not fit the datasets.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        seed: int,
        slots: Slots,
        stream: bool = False,
    ) -> None:
        of_sets = slots
        if isinstance(of_sets, int):
            of_sets = (of_sets,) * (len(sets) - stream) + (1,) * stream
        if len(of_sets) != len(sets) or len({1, *of_sets}) > 2:
            raise ValueError(
                f"slots is {list(of_sets)} for {count_noun(len(sets), 'set')}; give one number per"
                " set, 1 or one that is the same for all others."
            )
        indexed = zip(sets[: len(sets) - stream], of_sets, strict=not stream)
        self.orders = [
            SampleOrder(sizes, seed=seed + number, slots=of_set)
            for number, (sizes, of_set) in enumerate(indexed)
        ]
        self.orders += [StreamOrder(sum(sets[-1]))] * stream
        self.slots = slots = max(of_sets)
        self.shard_sizes = np.concatenate([order.shard_sizes for order in self.orders])
        self._firsts = np.cumsum([0, *(len(order.shard_sizes) for order in self.orders)])
        self.pattern = dataset_pattern(
            weights, next(period for period in PERIODS if slots % period)
        )
        self._drawn = self._cumulative_draws(self.pattern)
        self._slots: dict[int, tuple[NDArray[np.int16], NDArray[np.int32]]] = {}

    @property
    def samples(self) -> int:
        """Number of samples in all datasets."""
        return sum(order.samples for order in self.orders)

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples per epoch."""
        return sum(order.samples_per_epoch for order in self.orders)

    def check_batch(self, batch_size: int, world: int = 1) -> None:
        """Raise ValueError unless this global batch can be divided among `world` ranks."""
        check_batch(batch_size, world, self.slots)

    def batch(self, position: int, batch_size: int, rank: int = 0, world: int = 1) -> list[Address]:
        """Return the part of a global batch that belongs to `rank`; see `SampleOrder.batch`."""
        parts = turns_of_rank(position, batch_size, rank, world, self.slots)
        return [address for slot, turns in parts for address in self._slot_addresses(slot, turns)]

    def _slot_addresses(self, slot: int, turns: NDArray[np.int64]) -> list[Address]:
        """Return the samples of a slot at these turns, each from the dataset drawn there."""
        chosen, of_slot = self._slot(slot)
        period = len(self.pattern)
        places = turns % period
        positions = turns * self.slots + slot
        found: list[Address] = [Address(0, 0, 0)] * len(turns)
        for number, order in enumerate(self.orders):
            here = np.flatnonzero(chosen[places] == number)
            # How often the dataset was drawn before: in this slot, or in all if it has only one.
            alone = order.slots == 1
            drawn = (self._drawn if alone else of_slot)[number]
            periods, after = np.divmod((positions if alone else turns)[here], period)
            earlier = periods * int(drawn[-1]) + drawn[after]
            addresses = order.slot_addresses(0 if alone else slot, earlier)
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
            self._slots[slot] = (chosen, self._cumulative_draws(chosen))
        return self._slots[slot]

    def _cumulative_draws(self, chosen: NDArray[np.int16]) -> NDArray[np.int32]:
        """Return how often each dataset is in the first 0 … n of these draws: (datasets, n + 1)."""
        drawn = np.zeros((len(self.orders), len(chosen) + 1), dtype=np.int32)
        for number in range(len(self.orders)):
            drawn[number, 1:] = np.cumsum(chosen == number)
        return drawn


def dataset_pattern(weights: Sequence[float], period: int) -> NDArray[np.int16]:
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


def needless_slots(order: Order) -> bool:
    """Return whether slots leave out samples of a set that a single shuffle would include."""
    orders = order.orders if isinstance(order, MixedOrder) else [order]
    return any(
        one.samples > one.samples_per_epoch and one.samples <= WHOLE_SHUFFLE_LIMIT for one in orders
    )


def describe_order(order: Order) -> str:
    """Describe for a person how an epoch is shuffled, and how many samples it leaves out."""
    left_out = order.samples - order.samples_per_epoch
    if isinstance(order, StreamOrder):
        return "tars in a new order each epoch, and samples from a shuffle buffer"
    if order.slots == 1 and order.samples <= WHOLE_SHUFFLE_LIMIT:
        return "one shuffle of all samples per epoch"
    text = f"shuffled in {count_noun(order.slots, 'slot')}"
    return f"{text}, which leave {left_out:,} samples out of each epoch" if left_out else text
