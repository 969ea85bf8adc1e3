"""Transforms of images for training and evaluation: pure functions of seed, epoch and sample.

Images keep their stored type; the device flips and normalises them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream, stream_seed
from simmim.data.order.source import DataError, EncodedImage
from simmim.data.transforms.cropping import center_crop_resize, random_resized_crop
from simmim.data.transforms.decoding import ARRAY_EXTENSION, decode_image
from simmim.data.transforms.labels import IGNORED
from simmim.data.transforms.settings import DecodeSettings, RandomCropSettings


@dataclass(frozen=True)
class Targets:
    """Base of the target tensors of one image."""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor of each field."""
        return [getattr(self, field.name) for field in fields(self)]


class StackedTargets(Sequence[Targets]):
    """The targets of a batch, one tensor for each field, so that each is one copy to the device.

    Images may have tensors of different shapes, such as different numbers of objects. Pickled as
    arrays, like batches. This is not a dataclass, since FSDP would convert the values of one to the
    precision of the weights.

    Args:
        kind: class of the targets of an image.
        values: for each field the values of all images in a row.
        shapes: for each image the shape of each field.
    """

    def __init__(
        self,
        kind: type[Targets] = Targets,
        values: Sequence[Tensor] = (),
        shapes: Sequence[Sequence[torch.Size]] = (),
    ) -> None:
        self.kind, self.values, self.shapes = kind, values, shapes

    @classmethod
    def stack(cls, targets: Sequence[Targets]) -> Self:
        """Stack the targets of images of one task; there may be none."""
        if not targets:
            return cls()
        values = zip(*(one.tensors for one in targets), strict=True)
        return cls(
            type(targets[0]),
            [torch.cat([part.flatten() for part in parts]) for parts in values],
            [[part.shape for part in one.tensors] for one in targets],
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the targets with a function applied to the tensor of each field."""
        return type(self)(self.kind, [function(part) for part in self.values], self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, row: int) -> Targets: ...

    @overload
    def __getitem__(self, row: slice) -> Self: ...

    def __getitem__(self, row: int | slice) -> Targets | Self:
        """Return the targets of an image, which share memory with these; or those of several."""
        if isinstance(row, slice):
            return self.stack([self[one] for one in range(*row.indices(len(self)))])
        row, parts = range(len(self))[row], []
        for values, shapes in zip(self.values, zip(*self.shapes, strict=True), strict=True):
            first = sum(shape.numel() for shape in shapes[:row])
            own = values[first : first + shapes[row].numel()]
            parts.append(own.view(shapes[row]))
        return self.kind(*parts)

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = [part.cpu().numpy() for part in self.values]
        return _unpickle_targets, (self.kind, arrays, self.shapes)


def _unpickle_targets(
    kind: type[Targets], arrays: list[NDArray[Any]], shapes: Sequence[Sequence[torch.Size]]
) -> StackedTargets:
    """Rebuild pickled targets."""
    return StackedTargets(kind, [torch.from_numpy(array) for array in arrays], shapes)


@dataclass(frozen=True)
class ClassMap(Targets):
    """A class per pixel."""

    classes: Tensor
    """uint8 (height, width), 255 for ignored pixels."""
    present: Tensor
    """int64 (kinds,), the classes of any pixels, ascending; the host knows how many."""

    @classmethod
    def of(cls, classes: Tensor) -> Self:
        """Return the target of an image whose pixels have these classes."""
        counts = classes.flatten().bincount(minlength=256)
        return cls(classes, counts[:IGNORED].nonzero()[:, 0])


@dataclass(frozen=True)
class Instances(Targets):
    """The target objects of an image."""

    labels: Tensor
    """int64 (objects,)."""
    boxes: Tensor
    """float32 (objects, 4): left, top, right, bottom in pixels."""
    masks: Tensor
    """bool (objects, height, width); of height 0 if only boxes are used."""
    image: Tensor
    """int64 (3,): id, annotated height and annotated width of the image, for predictions."""


@dataclass(frozen=True)
class Sample:
    """A transformed sample, ready to be batched."""

    image: Tensor
    """(channels, height, width): uint8, or the type of the array."""
    mask: Tensor | None
    """bool (rows, columns) of mask cells, True = hidden."""
    label: int | Tensor
    """Class index, -1 for none; or bool (classes,), the classes it has."""
    flip: bool = False
    """Whether to flip the image horizontally, on the device."""
    repaired: str | None = None
    """Defect of a damaged file that could be decoded."""
    turned: str | None = None
    """Why the labels may not be upright although the image is."""
    targets: Targets | None = None
    """Targets of dense tasks."""


def stack_labels(samples: Sequence[Sample], *, has_classes: bool) -> Tensor | None:
    """Return the labels of a batch; None if samples are unlabelled (`has_classes` is False)."""
    several = [sample.label for sample in samples if isinstance(sample.label, Tensor)]
    if several:
        return torch.stack(several)
    if not has_classes:
        return None
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64)


LabelReader = Callable[[EncodedImage], int | Tensor]
"""Returns the label of an encoded sample; see `Sample.label`."""


def class_of(raw: EncodedImage) -> int:
    """Return the class index of a sample, -1 if it has none."""
    return -1 if raw.label is None else raw.label


MaskFunction = Callable[[torch.Generator], Tensor]
"""Returns one mask, bool (rows, columns) of mask cells, True = hidden."""

Augmentation = Callable[[Tensor, np.random.Generator], Tensor]
"""Augments one cropped image (channels, height, width), given its random stream."""


Transform = Callable[[EncodedImage, Address], Sample]


def torch_stream(purpose: str, *key: int | str) -> torch.Generator:
    """Return a fresh torch generator (CPU) for this purpose and key."""
    return torch.Generator().manual_seed(stream_seed(purpose, *key) % 2**63)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop, flip and mask, which differ between epochs but are reproducible."""

    data: RandomCropSettings
    """The crop."""
    seed: int
    channels: int = 3
    """1 (grey), 3 (colour) or 4 (colour, alpha); any number for arrays."""
    mask: MaskFunction | None = None
    augment: Augmentation | None = None
    """Augmentation of the crop."""
    label: LabelReader = class_of

    def __call__(self, raw: EncodedImage, address: Address) -> Sample:
        """Return the sample of this epoch."""
        decoded = decode_image(raw, channels=self.channels, settings=self.data)
        rng = numpy_stream("crop", self.seed, address.epoch, raw.name)
        crop = random_resized_crop(
            decoded.pixels, self.data.size, rng, scale=self.data.scale, ratio=self.data.ratio
        )
        flip = bool(rng.random() < self.data.flip)
        if self.augment is not None:
            if crop.dtype == torch.uint16 and raw.extension != ARRAY_EXTENSION:
                crop = ((crop.to(torch.int32) + 128) // 257).to(torch.uint8)
            if crop.dtype != torch.uint8:
                raise DataError("augmentation needs images of 8 bits: turn all of it off.")
            crop = self.augment(crop, numpy_stream("augment", self.seed, address.epoch, raw.name))
        mask = None
        if self.mask is not None:
            mask = self.mask(torch_stream("mask", self.seed, address.epoch, raw.name))
        return Sample(crop, mask, self.label(raw), flip, decoded.repaired)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Centre crop, and a mask that depends only on the sample: the same in every epoch."""

    size: tuple[int, int]
    """Height and width in pixels."""
    seed: int = 0
    crop_pct: float = 1.0
    """Fraction of the image's shorter side, relative to the crop, that is kept."""
    channels: int = 3
    """1 (grey), 3 (colour) or 4 (colour, alpha); any number for arrays."""
    mask: MaskFunction | None = None
    label: LabelReader = class_of
    data: DecodeSettings = field(default_factory=DecodeSettings)
    """Decoding of the image."""

    def __call__(self, raw: EncodedImage, address: Address) -> Sample:  # noqa: ARG002
        """Return the sample for evaluation."""
        decoded = decode_image(raw, channels=self.channels, settings=self.data)
        crop = center_crop_resize(decoded.pixels, self.size, crop_pct=self.crop_pct)
        mask = None
        if self.mask is not None:
            mask = self.mask(torch_stream("evaluation mask", self.seed, raw.name))
        return Sample(crop, mask, self.label(raw), repaired=decoded.repaired)
