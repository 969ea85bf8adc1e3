"""A batch of samples, and the dataset from which data workers make batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.format.manifest import ManifestError
from simmim.data.loader.bad_samples import BadSample
from simmim.data.order.order import Address
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import BadSampleError, DataError, Encoded, SampleSource
from simmim.data.transforms.image_transforms import (
    Sample,
    StackedTargets,
    stack_labels,
)

NO_TARGETS = StackedTargets()

REPLACEMENTS = 100
"""Samples of a shard tried in place of a damaged one before the shard is rejected."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of images in their stored type; the device flips and normalises them."""

    images: Tensor
    """(batch, channels, height, width), channels last in memory: uint8, or the type of arrays."""
    masks: Tensor | None
    """bool (batch, rows, columns) of mask cells, True = hidden. Always on the CPU, where what is
    to be decoded is looked up; the model copies them to the device."""
    labels: Tensor | None
    """int64 (batch,), -1 for none; or bool (batch, classes), the classes of each sample; None if
    the dataset has no labels."""
    addresses: Tensor
    """int64 (batch, 3): epoch, shard and sample; those of the replacement for a damaged sample.
    Always on the CPU."""
    flips: Tensor | None = None
    """bool (batch,): images to flip horizontally on the device; None flips none."""
    bad: tuple[BadSample, ...] = ()
    """Damaged samples."""
    targets: StackedTargets = NO_TARGETS
    """Targets of dense tasks for each image; empty for other tasks."""

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as arrays, which avoids torch's shared memory, newly cleared for every batch."""
        return unpack_batch, (self.pixels, *self.rest)

    @property
    def pixels(self) -> NDArray[Any]:
        """The images as an array (batch, height, width, channels)."""
        return self.images.permute(0, 2, 3, 1).cpu().numpy()

    @property
    def rest(self) -> tuple[Any, ...]:
        """Everything but the images, for `unpack_batch`."""
        parts = (self.masks, self.labels, self.addresses, self.flips)
        arrays = [None if part is None else part.cpu().numpy() for part in parts]
        return arrays, self.bad, self.targets

    def only(self, row: int) -> "Batch":
        """Return one sample as a batch."""
        one = self._map(lambda part: part[row : row + 1])
        return replace(
            one,
            masks=None if self.masks is None else self.masks[row : row + 1],
            addresses=self.addresses[row : row + 1],
            targets=self.targets[row : row + 1],
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device, except for masks and addresses.

        Copies to a GPU are asynchronous: neither do they wait for earlier work of the GPU, nor
        does this wait for them. Memory that is not pinned is staged by the driver meanwhile.
        """
        device = torch.device(device)
        waits = device.type in ("cpu", "mps")
        return self._map_with_targets(lambda part: part.to(device, non_blocking=not waits))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, for asynchronous copies to a GPU."""
        pinned = self._map_with_targets(lambda part: part.pin_memory())
        return replace(pinned, masks=None if self.masks is None else self.masks.pin_memory())

    def _map_with_targets(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self._map(function), targets=self.targets.map(function))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=function(self.images),
            labels=None if self.labels is None else function(self.labels),
            flips=None if self.flips is None else function(self.flips),
        )


def unpack_batch(
    images: NDArray[Any],
    arrays: Sequence[NDArray[Any] | None],
    bad: tuple[BadSample, ...],
    targets: StackedTargets,
) -> Batch:
    """Rebuild a pickled batch; `images` are channels last."""
    parts = [None if part is None else torch.from_numpy(part) for part in arrays]
    masks, labels, addresses, flips = parts
    assert addresses is not None
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Batch(planes, masks, labels, addresses, flips, bad, targets)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack images (channels, height, width) to a batch, channels last in memory.

    Next to images of 16 bits those of 8 bits are scaled, exactly, to the same range.
    """
    if not images:
        return torch.zeros(0, 0, 0, 0, dtype=torch.uint8)
    channels, height, width = images[0].shape
    is_deep = any(image.dtype == torch.uint16 for image in images)
    dtype = torch.uint16 if is_deep else images[0].dtype
    batch = torch.empty((len(images), height, width, channels), dtype=dtype)
    for row, image in zip(batch, images, strict=True):
        row.copy_(image.permute(1, 2, 0))
        if is_deep and image.dtype == torch.uint8:
            row.copy_(row.to(torch.int32) * 257)
    return batch.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Failure:
    """An error in a data worker, to be raised in the main process."""

    message: str


class BatchDataset(Dataset[Batch | Failure], Generic[Encoded]):
    """A map-style dataset from a list of addresses to the batch of these samples.

    Damaged samples are listed in the batch. With `replacing`, each is replaced by another sample of
    its shard, chosen as a pure function of the address; otherwise it is skipped.
    """

    def __init__(
        self,
        shards: SampleSource[Encoded],
        transform: Callable[[Encoded, Address], Sample],
        *,
        replacing: bool,
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.replacing = replacing

    def __getitem__(self, addresses: Sequence[Address]) -> Batch | Failure:
        """Return the batch, or the error that prevented it."""
        bad: list[BadSample] = []
        samples, found = [], []
        types: dict[str, str] = {}
        for address in addresses:
            try:
                taken = self._sample(address, bad)
            except (DataError, ManifestError) as error:
                return Failure(f"{self._where(address)}: {error}")
            if taken is not None:
                samples.append(taken[0])
                found.append(taken[1])
                dtype = str(taken[0].image.dtype).removeprefix("torch.")
                types.setdefault(dtype, taken[2])
        if len(types) > 1 and set(types) != {"uint8", "uint16"}:
            listed = ", ".join(f"{kind} (such as {name})" for kind, name in sorted(types.items()))
            return Failure(
                f"the images of a batch are of types that it cannot mix: {listed}. Put images and"
                " arrays of different types in separate shards, or write all arrays in one type."
            )
        masks = [sample.mask for sample in samples if sample.mask is not None]
        return Batch(
            images=stack_images([sample.image for sample in samples]),
            masks=torch.stack(masks) if masks else None,
            labels=stack_labels(samples, has_classes=bool(self.shards.classes)),
            addresses=torch.tensor(found, dtype=torch.int64).view(-1, 3),
            flips=torch.tensor([sample.flip for sample in samples]) if self.replacing else None,
            bad=tuple(bad),
            targets=StackedTargets.stack(
                [sample.targets for sample in samples if sample.targets is not None]
            ),
        )

    def _where(self, address: Address) -> str:
        """Return where an address is, for messages."""
        return f"shard {address.shard} of {self.shards.folder_of(address.shard)}"

    def _sample(self, address: Address, bad: list[BadSample]) -> tuple[Sample, Address, str] | None:
        """Return the sample at an address or its replacement, with the address and name of it."""
        name = ""
        for candidate in self._candidates(address):
            raw = self.shards.read(candidate.shard, candidate.sample)
            name = name or raw.name
            bad_sample = partial(
                BadSample,
                folder=self.shards.folder_of(candidate.shard),
                shard=raw.shard_name,
                key=raw.key,
            )
            try:
                sample = self.transform(raw, candidate)
            except BadSampleError as error:
                kind: Literal["replaced", "skipped"] = "replaced" if self.replacing else "skipped"
                bad.append(bad_sample(kind=kind, reason=str(error)))
                continue
            except DataError as error:
                raise DataError(f"sample {raw.name}: {error}") from None
            if sample.repaired is not None:
                bad.append(bad_sample(kind="repaired", reason=sample.repaired))
            if sample.turned is not None:
                bad.append(bad_sample(kind="turned", reason=sample.turned))
            return sample, candidate, raw.name
        if self.replacing:
            raise DataError(
                f"sample {name} is damaged ({bad[-1].reason}), and so are all replacements tried;"
                " write the samples again."
            )
        return None

    def _candidates(self, address: Address) -> Iterator[Address]:
        """Yield the address, then those of its replacements."""
        yield address
        if self.replacing:
            others = shuffled(self.shards.sizes[address.shard], "replacement", *address)
            for sample in others[: REPLACEMENTS + 1].tolist():
                if sample != address.sample:
                    yield address._replace(sample=sample)
