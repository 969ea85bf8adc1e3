"""A batch of samples, and how it is stacked and pickled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.data.loader.bad_samples import BadSample
from simmim.data.transforms.sample import Targets


@dataclass(frozen=True)
class Batch:
    """A micro-batch of images in their stored type; the device flips and normalises them."""

    images: Tensor
    """(batch, channels, height, width), channels last in memory: uint8, or the type of arrays."""
    masks: Tensor | None
    """bool (batch, rows, columns) of mask cells, True = hidden."""
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
    targets: tuple[Targets, ...] = ()
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
            one, addresses=self.addresses[row : row + 1], targets=self.targets[row : row + 1]
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device."""
        return self._map_with_targets(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, for asynchronous copies to a GPU."""
        return self._map_with_targets(lambda part: part.pin_memory())

    def _map_with_targets(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        targets = tuple(one.map(function) for one in self.targets)
        return replace(self._map(function), targets=targets)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=function(self.images),
            masks=None if self.masks is None else function(self.masks),
            labels=None if self.labels is None else function(self.labels),
            flips=None if self.flips is None else function(self.flips),
        )


def unpack_batch(
    images: NDArray[Any],
    arrays: Sequence[NDArray[Any] | None],
    bad: tuple[BadSample, ...],
    targets: tuple[Targets, ...],
) -> Batch:
    """Rebuild a pickled batch; `images` are channels last."""
    parts = [None if part is None else torch.from_numpy(part) for part in arrays]
    masks, labels, addresses, flips = parts
    assert addresses is not None
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Batch(planes, masks, labels, addresses, flips, bad, targets)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack images (channels, height, width) to a batch, channels last in memory."""
    if not images:
        return torch.zeros(0, 0, 0, 0, dtype=torch.uint8)
    channels, height, width = images[0].shape
    batch = torch.empty((len(images), height, width, channels), dtype=images[0].dtype)
    for row, image in zip(batch, images, strict=True):
        row.copy_(image.permute(1, 2, 0))
    return batch.permute(0, 3, 1, 2)
