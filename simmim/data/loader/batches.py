"""Batches: samples read, decoded and stacked by workers, in an order they cannot change."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.format.manifest import ManifestError
from simmim.data.datasets.mixture import Order
from simmim.data.datasets.remote import AheadOfBatches
from simmim.data.loader.bad_samples import BadSample, BadSamples
from simmim.data.loader.sampler import EvaluationPlan, TrainingPlan
from simmim.data.loader.shared_memory import Place, Slots, take
from simmim.data.loader.workers import heed_only_the_parent, start_without_stop_signals
from simmim.data.order.errors import BadSampleError, DataError
from simmim.data.order.order import Address
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import Raw, Source
from simmim.data.transforms.image_transforms import Sample, stacked_labels
from simmim.data.transforms.targets import Targets

REPLACEMENTS = 100
"""Samples of a shard that are tried in the place of a bad one before the shard is given up."""


@dataclass(frozen=True)
class Batch:
    """Images of one micro-batch as they were stored: the device mirrors and normalises them."""

    images: Tensor
    """(batch, channels, height, width), channels last in memory: uint8, or the type of arrays."""
    masks: Tensor | None
    """bool (batch, rows, columns) of mask cells, True = hidden."""
    labels: Tensor | None
    """int64 (batch,), -1 where a sample has none; or bool (batch, classes), which of them it has.
    None where no sample of the set has one."""
    addresses: Tensor
    """int64 (batch, 3): epoch, shard and sample, of what takes the place of a damaged one its own.
    Stays on the CPU."""
    flips: Tensor | None = None
    """bool (batch,): which images the device mirrors; None mirrors none."""
    bad: tuple[BadSample, ...] = ()
    """What could not be read as it should."""
    targets: tuple[Targets, ...] = ()
    """What a dense stage learns of each image; none for other stages."""

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as bytes, which need no shared memory of torch's, cleared anew for each batch."""
        return unpacked, (self.pixels, *self.rest)

    @property
    def pixels(self) -> np.ndarray:
        """The images (batch, height, width, channels) as an array."""
        return self.images.permute(0, 2, 3, 1).cpu().numpy()

    @property
    def rest(self) -> tuple[Any, ...]:
        """All but the images, for `unpacked`."""
        parts = (self.masks, self.labels, self.addresses, self.flips)
        arrays = [None if part is None else part.cpu().numpy() for part in parts]
        return arrays, self.bad, self.targets

    def only(self, row: int) -> "Batch":
        """Return one of its samples as a batch."""
        one = self._each(lambda part: part[row : row + 1])
        return replace(
            one, addresses=self.addresses[row : row + 1], targets=self.targets[row : row + 1]
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device."""
        return self._with_targets(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from where it copies to a GPU while that computes."""
        return self._with_targets(lambda part: part.pin_memory())

    def _with_targets(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        targets = tuple(one.each(change) for one in self.targets)
        return replace(self._each(change), targets=targets)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=change(self.images),
            masks=None if self.masks is None else change(self.masks),
            labels=None if self.labels is None else change(self.labels),
            flips=None if self.flips is None else change(self.flips),
        )


def unpacked(
    images: np.ndarray,
    arrays: Sequence[np.ndarray | None],
    bad: tuple[BadSample, ...],
    targets: tuple[Targets, ...],
) -> Batch:
    """Return a batch as it was before it was sent; `images` has its channels last."""
    parts = [None if part is None else torch.from_numpy(part) for part in arrays]
    masks, labels, addresses, flips = parts
    assert addresses is not None
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Batch(planes, masks, labels, addresses, flips, bad, targets)


@dataclass(frozen=True)
class Posted:
    """A batch on its way, whose images are in a slot: it arrives as the batch it was."""

    place: Place
    rest: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the images out of their slot on arrival."""
        return received, (self.place, self.rest)


def received(place: Place, rest: tuple[Any, ...]) -> Batch:
    """Return a batch whose images are in a slot."""
    return unpacked(take(place), *rest)


@dataclass(frozen=True)
class Failure:
    """A mistake in the data, carried from a worker to the process that can report it."""

    message: str


class AddressedSamples(Dataset[Batch | Failure], Generic[Raw]):
    """Answers a list of addresses with the batch of what stands there.

    A sample that is damaged is named in the batch. With `replacing`, another one of its shard
    takes its place: which one is a pure function of the address. Else it is left out.
    """

    def __init__(
        self, shards: Source[Raw], transform: Callable[[Raw, Address], Sample], *, replacing: bool
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.replacing = replacing

    def __getitem__(self, addresses: Sequence[Address]) -> Batch | Failure:
        """Return the batch, or what kept it from being made."""
        bad: list[BadSample] = []
        samples, found = [], []
        for address in addresses:
            try:
                taken = self._sample(address, bad)
            except (DataError, ManifestError) as error:
                folder = self.shards.folder_of(address.shard)
                return Failure(f"shard {address.shard} of {folder}: {error}")
            if taken is not None:
                samples.append(taken[0])
                found.append(taken[1])
        kinds = {str(sample.image.dtype).removeprefix("torch.") for sample in samples}
        if len(kinds) > 1:
            return Failure(
                f"a batch would mix {' and '.join(sorted(kinds))}: keep images and arrays of"
                " different types in shards of their own, or write the arrays in one type"
            )
        masks = [sample.mask for sample in samples if sample.mask is not None]
        return Batch(
            images=stacked([sample.image for sample in samples]),
            masks=torch.stack(masks) if masks else None,
            labels=stacked_labels(samples, classes=bool(self.shards.classes)),
            addresses=torch.tensor(found, dtype=torch.int64).view(-1, 3),
            flips=torch.tensor([sample.flip for sample in samples]) if self.replacing else None,
            bad=tuple(bad),
            targets=tuple(sample.targets for sample in samples if sample.targets is not None),
        )

    def _sample(self, address: Address, bad: list[BadSample]) -> tuple[Sample, Address] | None:
        """Return the sample at an address, or what takes its place, and the address of that."""
        name = ""
        for place in self._candidates(address):
            raw = self.shards.read(place.shard, place.sample)
            name = name or raw.name
            known = partial(
                BadSample,
                folder=self.shards.folder_of(place.shard),
                shard=raw.shard_name,
                key=raw.key,
            )
            try:
                sample = self.transform(raw, place)
            except BadSampleError as error:
                kind: Literal["replaced", "skipped"] = "replaced" if self.replacing else "skipped"
                bad.append(known(kind=kind, reason=str(error)))
                continue
            except DataError as error:
                raise DataError(f"sample {raw.name}: {error}") from None
            if sample.repaired is not None:
                bad.append(known(kind="repaired", reason=sample.repaired))
            return sample, place
        if self.replacing:
            raise DataError(
                f"sample {name} is damaged ({bad[-1].reason}), and so is every other one that was"
                " tried in its place; write them anew"
            )
        return None

    def _candidates(self, address: Address) -> Iterator[Address]:
        """Yield the address, and then those that may take its place."""
        yield address
        if self.replacing:
            others = shuffled(self.shards.sizes[address.shard], "replacement", *address)
            for sample in others[: REPLACEMENTS + 1].tolist():
                if sample != address.sample:
                    yield address._replace(sample=sample)


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Return images (channels, height, width) as one batch, channels last in memory."""
    if not images:
        return torch.zeros(0, 0, 0, 0, dtype=torch.uint8)
    channels, height, width = images[0].shape
    batch = torch.empty((len(images), height, width, channels), dtype=images[0].dtype)
    for row, image in zip(batch, images, strict=True):
        row.copy_(image.permute(1, 2, 0))
    return batch.permute(0, 3, 1, 2)


class BatchStream:
    """Batches of the listed addresses, one for each list, in their order."""

    def __init__(
        self,
        dataset: AddressedSamples[Any],
        plan: TrainingPlan | EvaluationPlan,
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        bad_samples: BadSamples | None,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"workers is {workers} and prefetch {prefetch}; they must be at least 0 and 1"
            )
        self.dataset = dataset
        self.plan = plan
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.bad_samples = BadSamples() if bad_samples is None else bad_samples

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, without those of which nothing could be read.

        Raises DataError naming the shard of what cannot be read, or where too many are bad.
        """
        loader: DataLoader[Batch | Failure] = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._addresses(),
            num_workers=self.workers,
            collate_fn=self._sender(),
            pin_memory=self.pin_memory,
            worker_init_fn=heed_only_the_parent,
            prefetch_factor=self.prefetch if self.workers else None,
            # Its own, so that starting a loader does not draw from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        batches = start_without_stop_signals(loader)
        try:
            while (batch := fetch(batches)) is not None:
                if isinstance(batch, Failure):
                    raise DataError(batch.message)
                skipped = sum(sample.kind == "skipped" for sample in batch.bad)
                self.bad_samples.record(len(batch) + skipped, batch.bad)
                if len(batch):
                    yield batch
        finally:
            # Ends the workers now. Left to the traceback of an error, they would go with a heap
            # of garbage, their queues first, and could not be told.
            del batches

    def _sender(self) -> Callable[[Any], Any]:
        """Return what hands on what a worker made."""
        if self.workers:
            with suppress(AttributeError, OSError):  # not on Linux, or not granted
                return Sender(Slots(self.workers, self.prefetch + 1))
        return as_it_is

    def _addresses(self) -> Iterable[Sequence[Address]]:
        """Return the plan, with the shards of coming batches fetched ahead where that helps."""
        shards = self.dataset.shards
        return AheadOfBatches(self.plan, shards.fetch) if shards.fetches_whole_shards else self.plan


class TrainingBatches(BatchStream):
    """The micro-batches of one rank, from one cursor to another, across epochs.

    Each global batch is dealt to the ranks by slots, and a rank's part is cut into `accumulation`
    micro-batches in order. Neither ranks nor workers change which samples a global batch holds or
    how they look. `len` counts micro-batches. Raises ValueError where sizes do not divide.
    """

    def __init__(
        self,
        shards: Source[Raw],
        order: Order,
        transform: Callable[[Raw, Address], Sample],
        *,
        batch_size: int,
        start_position: int,
        end_position: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        bad_samples: BadSamples | None = None,
    ) -> None:
        if order.shard_sizes.tolist() != shards.sizes:
            raise ValueError("the order was made for other shards: give it `shards.sizes`")
        plan = TrainingPlan(
            order=order,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world=world,
            start=start_position,
            stop=end_position,
        )
        super().__init__(
            AddressedSamples(shards, transform, replacing=True),
            plan,
            workers=workers,
            prefetch=prefetch,
            pin_memory=pin_memory,
            bad_samples=bad_samples,
        )


def evaluation_batches(
    shards: Source[Raw],
    transform: Callable[[Raw, Address], Sample],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    bad_samples: BadSamples | None = None,
) -> BatchStream:
    """Return the batches of one rank: every sample once over all ranks, in order.

    `batch_size` is global, and each rank takes an equal run of it; the last batch is shorter, and
    a rank that would get nothing of it skips it, so ranks may differ by one batch. Samples that
    cannot be read are left out, counted and named: figures are over those that can, and nothing
    stands in for another.
    """
    plan = EvaluationPlan(sizes=shards.sizes, batch_size=batch_size, rank=rank, world=world)
    return BatchStream(
        AddressedSamples(shards, transform, replacing=False),
        plan,
        workers=workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        bad_samples=bad_samples,
    )


def fetch(batches: Iterator[Batch | Failure]) -> Batch | Failure | None:
    """Return the next batch, what kept it from being made, or None at the end."""
    try:
        return next(batches, None)
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        # The last three come of tensors whose sender is no more.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        return Failure(
            f"a data worker died ({error or 'it left nothing'}); most often the machine ran out"
            " of memory or of shared memory (/dev/shm): use fewer workers, or smaller batches"
        )


def as_it_is(made: Any) -> Any:
    """Return what the dataset made: it collates by itself."""
    return made


@dataclass(frozen=True)
class Sender:
    """Hands on what a worker made, images by way of a slot where one is free."""

    slots: Slots

    def __call__(self, made: Batch | Failure) -> Batch | Failure | Posted:
        """Return what goes through the pipe."""
        place = self.slots.fill(made.pixels) if isinstance(made, Batch) else None
        return made if place is None or isinstance(made, Failure) else Posted(place, made.rest)
