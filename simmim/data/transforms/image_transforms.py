"""Transforms of images for training and evaluation: pure functions of seed, epoch and sample.

Images keep their stored type; the device flips and normalises them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream, stream_seed
from simmim.data.order.source import DataError, EncodedImage
from simmim.data.transforms.cropping import center_crop_resize, random_resized_crop
from simmim.data.transforms.decoding import decode_pixels
from simmim.data.transforms.labels import LabelReader, class_of
from simmim.data.transforms.sample import Sample
from simmim.data.transforms.settings import MAX_PIXELS

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

    size: tuple[int, int]
    """Height and width in pixels."""
    seed: int
    scale: tuple[float, float] = (0.67, 1.0)
    """Range of the crop's area, as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio (width / height)."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    channels: int = 3
    """1 (grey), 3 (colour) or 4 (colour, alpha); any number for arrays."""
    mask: MaskFunction | None = None
    augment: Augmentation | None = None
    """Augmentation of the crop."""
    label: LabelReader = class_of
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded."""

    def __call__(self, raw: EncodedImage, address: Address) -> Sample:
        """Return the sample of this epoch."""
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
    """Share of the image's shorter side, relative to the crop, that is kept."""
    channels: int = 3
    """1 (grey), 3 (colour) or 4 (colour, alpha); any number for arrays."""
    mask: MaskFunction | None = None
    label: LabelReader = class_of
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded."""

    def __call__(self, raw: EncodedImage, address: Address) -> Sample:  # noqa: ARG002
        """Return the sample for evaluation."""
        decoded = decode_pixels(
            raw.image, raw.extension, channels=self.channels, max_pixels=self.max_pixels
        )
        crop = center_crop_resize(decoded.pixels, self.size, crop_pct=self.crop_pct)
        mask = None
        if self.mask is not None:
            mask = self.mask(torch_stream("evaluation mask", self.seed, raw.name))
        return Sample(crop, mask, self.label(raw), repaired=decoded.repaired)
