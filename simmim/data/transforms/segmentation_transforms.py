"""From an image with its labels to what a model takes, a pure function of seed, epoch and sample.

Source of scales and crops: UperNet's reference recipes (scale 0.5 to 2, crop, no class above three
quarters of a crop, mirroring, photometric distortion as in SSD).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simmim.data.datasets.label_maps import LabelledImage
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.cropping import Box, resize
from simmim.data.transforms.decoding import decode_pixels
from simmim.data.transforms.image_transforms import Sample
from simmim.data.transforms.label_image import IGNORED, LabelReading
from simmim.data.transforms.pillow_decoding import MAX_PIXELS
from simmim.data.transforms.targets import ClassMap

CROP_ATTEMPTS = 10
"""Crops that are drawn until none of their classes is too large."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A part of an image, and the size it is brought to."""

    box: Box
    size: tuple[int, int]

    def image(self, pixels: np.ndarray) -> Tensor:
        """Cut (rows, columns, channels) pixels: (channels, rows, columns)."""
        return resize(pixels, self.box, self.size)

    def nearest(self, labels: np.ndarray) -> np.ndarray:
        """Cut (..., rows, columns) of labels, taking the nearest pixel."""
        rows = self.box.top + _centres(self.box.height, self.size[0])
        columns = self.box.left + _centres(self.box.width, self.size[1])
        return labels[..., rows[:, None], columns]


def _centres(length: int, count: int) -> np.ndarray:
    return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def draw_cut(shape: tuple[int, ...], side: int, factor: float, rng: np.random.Generator) -> Cut:
    """Draw a square of `side` pixels from an image scaled by `factor`, less where it ends."""
    parts = []
    for length in shape[:2]:
        scaled = max(1, round(length * factor))
        taken = min(side, scaled)
        first = int(rng.integers(scaled - taken + 1))
        start = min(length - 1, round(first / factor))
        parts.append((start, max(1, min(length - start, round(taken / factor))), taken))
    (top, height, rows), (left, width, columns) = parts
    return Cut(box=Box(top, left, height, width), size=(rows, columns))


def pad(image: Tensor, side: int, filling: Sequence[float]) -> Tensor:
    """Return (channels, rows, columns) filled up to a square, right and below."""
    if image.shape[1:] == (side, side):
        return image
    padded = torch.empty(image.shape[0], side, side, dtype=image.dtype)
    padded[:] = torch.tensor(filling).to(image.dtype).view(-1, 1, 1)
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def filling_of(mean: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Return the stored value of each channel that is normalised to 0."""
    scale = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(dtype, 1.0)
    return [scale * value for value in mean]


@dataclass(frozen=True, kw_only=True)
class SegmentationTransform:
    """Random scale, crop, flip and colours."""

    side: int
    """Of the square crop, pixels."""
    seed: int
    labels: LabelReading
    mean: tuple[float, ...]
    short_side: int | None = None
    """What the short side is scaled to before the random scale; None keeps the image's."""
    scale: tuple[float, float] = (0.5, 2.0)
    largest_class: float = 0.75
    """Share of a crop that one class may have; other crops are tried first."""
    flip: float = 0.5
    photometric: bool = True
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: LabelledImage, address: Address) -> Sample:
        """Return the sample as this epoch shows it."""
        decoded = decode_pixels(
            raw.image, raw.extension, channels=self.channels, max_pixels=self.max_pixels
        )
        labels = self.labels(raw.labels, decoded.pixels.shape)
        rng = numpy_stream("dense crop", self.seed, address.epoch, raw.name)
        factor = rng.uniform(*self.scale) * _factor(labels.shape, self.short_side)
        for _ in range(CROP_ATTEMPTS):
            cut = draw_cut(labels.shape, self.side, factor, rng)
            classes = cut.nearest(labels)
            if _largest_share(classes) <= self.largest_class:
                break
        image = cut.image(decoded.pixels)
        if rng.random() < self.flip:
            image, classes = image.flip(-1), classes[:, ::-1]
        if self.photometric and image.dtype == torch.uint8 and self.channels == 3:
            image = distort(image, rng)
        image = pad(image, self.side, filling_of(self.mean, image.dtype))
        target = pad(torch.from_numpy(classes.copy())[None], self.side, [IGNORED])[0]
        return Sample(image, None, -1, repaired=decoded.repaired, targets=ClassMap(target))


@dataclass(frozen=True, kw_only=True)
class SegmentationView:
    """The whole image at the size that evaluation starts from, and its labels at their own."""

    labels: LabelReading
    short_side: int | None = None
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: LabelledImage, address: Address) -> Sample:
        """Return the sample as evaluation sees it."""
        del address
        decoded = decode_pixels(
            raw.image, raw.extension, channels=self.channels, max_pixels=self.max_pixels
        )
        labels = self.labels(raw.labels, decoded.pixels.shape)
        image = whole(decoded.pixels, _factor(labels.shape, self.short_side))
        target = ClassMap(torch.from_numpy(labels))
        return Sample(image, None, -1, repaired=decoded.repaired, targets=target)


SegmentationSamples = Callable[[LabelledImage, Address], Sample]


def whole(pixels: np.ndarray, factor: float) -> Tensor:
    """Return all of an image, scaled: (channels, rows, columns)."""
    height, width = pixels.shape[:2]
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return resize(pixels, Box(0, 0, height, width), size)


def _factor(shape: tuple[int, ...], short_side: int | None) -> float:
    return 1.0 if short_side is None else short_side / min(shape[:2])


def _largest_share(classes: np.ndarray) -> float:
    counts = np.bincount(classes.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / max(1, counts.sum()))


def distort(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue at random, each half of the time.

    Args:
        image: uint8 (3, rows, columns).
        rng: every call draws the same number of values.
    """
    wanted = rng.random(5) < 0.5
    brightness = rng.uniform(-32, 32)
    contrast, saturation = rng.uniform(0.5, 1.5, 2)
    hue = round(rng.uniform(-18, 18) * 256 / 180)
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    if wanted[0]:
        pixels = pixels + np.float32(brightness)
    if wanted[1] and wanted[4]:
        pixels = pixels * np.float32(contrast)
    if wanted[2] or wanted[3]:
        colours = np.array(Image.fromarray(_bytes(pixels)).convert("HSV"))
        if wanted[2]:
            colours[..., 1] = _bytes(colours[..., 1] * np.float32(saturation))
        if wanted[3]:
            colours[..., 0] = (colours[..., 0].astype(np.int64) + hue) % 256
        pixels = np.array(Image.fromarray(colours, "HSV").convert("RGB")).astype(np.float32)
    if wanted[1] and not wanted[4]:
        pixels = pixels * np.float32(contrast)
    return torch.from_numpy(_bytes(pixels)).permute(2, 0, 1)


def _bytes(values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.rint(values).clip(0, 255).astype(np.uint8)
    return rounded
