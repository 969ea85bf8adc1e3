"""Several sets of shards mixed by weight: as one set to read from, and in one order.

The rule: the global stream is written in turns, each of one sample from every slot. A pattern of
fixed length, repeated along the stream, says which set each of its places draws from: each as often
as its weight asks for, and as evenly spread as can be. Every set is walked through in its own
order, epoch after epoch, as though it were alone. So a cursor is still all the state, and every
batch holds each set in proportion, to within a few samples.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from simmim.data.datasets.samples import SampleSet
from simmim.data.order.order import Address, SampleOrder, check_batch, slots_of, turns_of
from simmim.data.order.source import EncodedImage, Source

PERIODS = (10_007, 10_009)
"""Lengths of the pattern, both prime: the first that does not divide the number of slots, so that
the places of every slot run through all of it."""


class MixedShards:
    """Several sets of shards, one after the other, as one.

    Labels need the same classes in all sets; where they differ, the samples count as unlabelled.
    Raises ValueError unless there is a weight above 0 for each set.
    """

    def __init__(self, sets: Sequence[SampleSet], weights: Sequence[float]) -> None:
        if not sets or len(sets) != len(weights) or not min(weights) > 0:
            raise ValueError("a mixture needs sets of shards, and a weight above 0 for each")
        self.sets = tuple(sets)
        self.weights = tuple(weights)
        self._firsts = np.cumsum([0, *(len(one.sizes) for one in self.sets)])

    @property
    def folder(self) -> str:
        """The folders of all sets, for a person."""
        return ", ".join(str(one.folder) for one in self.sets)

    def folder_of(self, shard: int) -> str:
        """Return the folder of a shard."""
        return str(self.sets[self._place(shard)[0]].folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none where the sets have different ones."""
        first = self.sets[0].classes
        return first if all(one.classes == first for one in self.sets) else ()

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard, set after set."""
        return [size for one in self.sets for size in one.sizes]

    @property
    def samples(self) -> int:
        """Samples in all sets."""
        return sum(one.samples for one in self.sets)

    @property
    def digest(self) -> str:
        """SHA-256 over the digests and weights of the sets."""
        digest = hashlib.sha256()
        for one, weight in zip(self.sets, self.weights, strict=True):
            digest.update(f"{one.digest} {weight!r}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.samples

    def read(self, shard: int, sample: int) -> EncodedImage:
        """Return a sample; raises DataError naming the shard where it cannot be read."""
        number, own = self._place(shard)
        return self.sets[number].read(own, sample)

    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, as messages call it."""
        number, own = self._place(shard)
        return self.sets[number].name(own, sample)

    @property
    def fetches_whole_shards(self) -> bool:
        """Whether reading any set brings whole shards into a cache."""
        return any(one.fetches_whole_shards for one in self.sets)

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache where its set has one; see `SampleSet.fetch`."""
        number, own = self._place(shard)
        self.sets[number].fetch(own)

    def labels(self, shard: int) -> np.ndarray:
        """Return the label of each sample of a shard, int64, -1 where there is none."""
        number, own = self._place(shard)
        labels = self.sets[number].labels(own)
        return labels if self.classes else np.full_like(labels, -1)

    def require_labels(self) -> None:
        """Raise ValueError unless the images have at least two classes, the same in all sets."""
        for one in self.sets:
            one.require_labels()
        if not self.classes:
            raise ValueError(
                f"the sets {self.folder} have different classes, so a label does not mean the same"
                " in all of them: make them with the same class folders"
            )

    def split(self, validation_shards: int) -> tuple["MixedShards", "MixedShards"]:
        """Return (training, validation): the last shards of each set are held out."""
        parts = [one.split(validation_shards) for one in self.sets]
        training, validation = zip(*parts, strict=True)
        return MixedShards(training, self.weights), MixedShards(validation, self.weights)

    def share(self, share: float, *, seed: int) -> "MixedShards":
        """Return this share of each class's samples of each set; see `SampleSet.share`."""
        return self._changed(lambda one: one.share(share, seed=seed))

    def only_classes(self, names: Sequence[str]) -> "MixedShards":
        """Return the samples of these classes; see `SampleSet.only_classes`."""
        return self._changed(lambda one: one.only_classes(names))

    def _changed(self, change: Callable[[SampleSet], SampleSet]) -> "MixedShards":
        return MixedShards([change(one) for one in self.sets], self.weights)

    def _place(self, shard: int) -> tuple[int, int]:
        """Return which set holds a shard, and its number there."""
        number = int(np.searchsorted(self._firsts, shard, side="right")) - 1
        return number, shard - int(self._firsts[number])


class MixedOrder:
    """The endless sequence of samples of several sets; `SampleOrder` is that of one.

    An epoch counts as many samples as the epochs of all sets together; a set of a large weight is
    then walked through more than once. The epoch of an address is that of its own set.

    Args:
        sets: samples in each shard of each set.
        weights: of the sets, above 0.
        seed: of each set's order.
        slots: of each set's order.

    Raises:
        ValueError: a set has fewer samples than slots, or a weight that would never be drawn.
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
        self._slots: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Samples an epoch consumes."""
        return sum(order.samples_per_epoch for order in self.orders)

    def check_batch(self, batch_size: int, world: int = 1) -> None:
        """Raise ValueError unless this global batch can be dealt to `world` ranks."""
        check_batch(batch_size, world, self.slots)

    def batch(self, position: int, batch_size: int, rank: int = 0, world: int = 1) -> list[Address]:
        """Return the part of `rank` in the global batch at a cursor; see `SampleOrder.batch`."""
        self.check_batch(batch_size, world)
        turns = turns_of(position, batch_size, self.slots)
        owned = slots_of(rank, world, self.slots)
        return [address for slot in owned for address in self._slot_addresses(slot, turns)]

    def _slot_addresses(self, slot: int, turns: np.ndarray) -> list[Address]:
        """Return what a slot gives at these turns, each from the set whose turn it is."""
        chosen, drawn = self._slot(slot)
        periods, places = np.divmod(turns, len(self.pattern))
        found: list[Address] = [Address(0, 0, 0)] * len(turns)
        for number, order in enumerate(self.orders):
            here = np.flatnonzero(chosen[places] == number)
            # How often the set was drawn before: in whole periods, and since.
            earlier = periods[here] * int(drawn[number, -1]) + drawn[number, places[here]]
            addresses = order.slot_addresses(slot, earlier)
            first = int(self._firsts[number])
            for place, (epoch, shard, sample) in zip(here.tolist(), addresses, strict=True):
                found[place] = Address(epoch, first + shard, sample)
        return found

    def _slot(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pattern as a slot meets it, turn by turn, and how often each set was drawn.

        Of shapes (period,) and (sets, period + 1).
        """
        if slot not in self._slots:
            period = len(self.pattern)
            chosen = self.pattern[(np.arange(period) * self.slots + slot) % period]
            drawn = np.zeros((len(self.orders), period + 1), dtype=np.int32)
            for number in range(len(self.orders)):
                drawn[number, 1:] = np.cumsum(chosen == number)
            self._slots[slot] = (chosen, drawn)
        return self._slots[slot]


def pattern(weights: Sequence[float], period: int) -> np.ndarray:
    """Return which set each of `period` places draws from, as evenly spread as can be.

    Raises ValueError where a set is so light that it would not be drawn at all.
    """
    shares = np.asarray(weights, dtype=np.float64) / float(np.sum(weights)) * period
    counts = np.floor(shares).astype(np.int64)
    left = period - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:left]] += 1  # the largest remainders
    if not counts.all():
        raise ValueError(
            f"a weight is below a {period:,}th of all weights, and its set would never be drawn:"
            " raise it, or leave the set out"
        )
    moments = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    numbers = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return numbers[np.argsort(moments, kind="stable")]


Shards = SampleSet | MixedShards
"""What samples are read from."""

Order = SampleOrder | MixedOrder
"""What says which sample comes next."""


def order_of(shards: Source[Any], *, seed: int, slots: int) -> Order:
    """Return the order of the samples of a list, or of a mixture of sets."""
    if isinstance(shards, MixedShards):
        sizes = [one.sizes for one in shards.sets]
        return MixedOrder(sizes, shards.weights, seed=seed, slots=slots)
    return SampleOrder(shards.sizes, seed=seed, slots=slots)
