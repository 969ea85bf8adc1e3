"""From a raw sample to model input, each a pure function of the seed, the epoch and the sample.

Images keep the type they have, and are mirrored and normalised on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simmim.data.order.errors import DataError
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream, stream_seed
from simmim.data.order.source import EncodedImage
from simmim.data.transforms.cropping import center_crop_resize, random_resized_crop
from simmim.data.transforms.decoding import decode_pixels
from simmim.data.transforms.pillow_decoding import MAX_PIXELS
from simmim.data.transforms.targets import Targets

MaskDraw = Callable[[torch.Generator], Tensor]
"""Draws one mask, bool (rows, columns) of mask cells, True = hidden."""

LabelReading = Callable[[EncodedImage], int | Tensor]
"""Returns the label of a sample; see `Sample.label`."""

PictureChange = Callable[[Tensor, np.random.Generator], Tensor]
"""Changes one cropped picture, (channels, height, width), by a random stream of its own."""


@dataclass(frozen=True)
class Sample:
    """One image ready to be batched."""

    image: Tensor
    """(channels, height, width): uint8, or the type of the array that it was."""
    mask: Tensor | None
    """bool (rows, columns) of mask cells, True = hidden."""
    label: int | Tensor
    """Place in the list of classes, -1 where there is none; or bool (classes,), which it has."""
    flip: bool = False
    """Whether the device mirrors the image."""
    repaired: str | None = None
    """What is wrong with a file that was read all the same."""
    targets: Targets | None = None
    """What a dense stage learns of the image."""


Transform = Callable[[EncodedImage, Address], Sample]


def stacked_labels(samples: Sequence[Sample], *, classes: bool) -> Tensor | None:
    """Return the labels of a batch; `classes` says whether samples with one class have a label."""
    several = [sample.label for sample in samples if isinstance(sample.label, Tensor)]
    if several:
        return torch.stack(several)
    if not classes:
        return None
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64)


def torch_stream(purpose: str, *key: int | str) -> torch.Generator:
    """Return a fresh torch generator (CPU) for this purpose and key."""
    return torch.Generator().manual_seed(stream_seed(purpose, *key) % 2**63)


def class_of(raw: EncodedImage) -> int:
    """Return the place of a sample's class in the list of classes, -1 where it has none."""
    return -1 if raw.label is None else raw.label


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop, flip and mask. A sample looks different in each epoch, but always the same."""

    size: tuple[int, int]
    """Height and width, pixels."""
    seed: int
    scale: tuple[float, float] = (0.67, 1.0)
    """Least and greatest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width-to-height ratio."""
    flip: float = 0.5
    """Probability of mirroring."""
    channels: int = 3
    """1 grey, 3 colour, 4 colour and transparency; arrays have any number."""
    mask: MaskDraw | None = None
    augment: PictureChange | None = None
    """What else is done to the crop."""
    label: LabelReading = class_of
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded."""

    def __call__(self, raw: EncodedImage, address: Address) -> Sample:
        """Return the sample as this epoch shows it."""
        decoded = decode_pixels(
            raw.image, raw.extension, channels=self.channels, max_pixels=self.max_pixels
        )
        rng = numpy_stream("crop", self.seed, address.epoch, raw.name)
        crop = random_resized_crop(
            decoded.pixels, self.size, rng, scale=self.scale, ratio=self.ratio
        )
        flip = bool(rng.random() < self.flip)
        if self.augment is not None:
            if crop.dtype != torch.uint8:
                raise DataError("augmentation needs images of 8 bits: set all of it to off")
            crop = self.augment(crop, numpy_stream("augment", self.seed, address.epoch, raw.name))
        mask = None
        if self.mask is not None:
            mask = self.mask(torch_stream("mask", self.seed, address.epoch, raw.name))
        return Sample(crop, mask, self.label(raw), flip, decoded.repaired)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """The middle of the image and a mask that is the sample's own, the same in every epoch."""

    size: tuple[int, int]
    """Height and width, pixels."""
    seed: int = 0
    crop_pct: float = 1.0
    """Share of the covering side that is kept."""
    channels: int = 3
    """1 grey, 3 colour, 4 colour and transparency; arrays have any number."""
    mask: MaskDraw | None = None
    label: LabelReading = class_of
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded."""

    def __call__(self, raw: EncodedImage, address: Address) -> Sample:  # noqa: ARG002
        """Return the sample as evaluation sees it."""
        decoded = decode_pixels(
            raw.image, raw.extension, channels=self.channels, max_pixels=self.max_pixels
        )
        crop = center_crop_resize(decoded.pixels, self.size, crop_pct=self.crop_pct)
        mask = None
        if self.mask is not None:
            mask = self.mask(torch_stream("evaluation mask", self.seed, raw.name))
        return Sample(crop, mask, self.label(raw), repaired=decoded.repaired)
