"""Transforms for segmentation: pure functions of seed, epoch and sample.

Source of scales and crops: UperNet's reference recipes (scale 0.5 to 2, crop with no class above
75 %, flip, photometric distortion as in SSD).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simmim.data.datasets.label_maps import LabelledImage
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.cropping import Box, resize
from simmim.data.transforms.decoding import decode_image
from simmim.data.transforms.image_transforms import ClassMap, Sample
from simmim.data.transforms.labels import IGNORED, LabelMapReader
from simmim.data.transforms.settings import SegmentationCropSettings
from simmim.data.transforms.turned import unsure_frame

CROP_ATTEMPTS = 10
"""Crops drawn at most until none of their classes is too large."""


@dataclass(frozen=True, kw_only=True)
class ResizedCrop:
    """A crop of an image, and the size it is resized to."""

    box: Box
    size: tuple[int, int]

    def image(self, pixels: NDArray[Any]) -> Tensor:
        """Crop pixels (rows, columns, channels), bicubically: (channels, rows, columns)."""
        return resize(pixels, self.box, self.size)

    def nearest(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Crop labels (..., rows, columns), by nearest neighbour."""
        rows = self.box.top + _centres(self.box.height, self.size[0])
        columns = self.box.left + _centres(self.box.width, self.size[1])
        return labels[..., rows[:, None], columns]


def _centres(length: int, count: int) -> NDArray[np.int64]:
    return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def draw_crop(
    shape: tuple[int, ...], side: int, factor: float, rng: np.random.Generator
) -> ResizedCrop:
    """Draw a square crop of `side` pixels of an image scaled by `factor`; smaller if it ends."""
    parts = []
    for length in shape[:2]:
        scaled = max(1, round(length * factor))
        taken = min(side, scaled)
        first = int(rng.integers(scaled - taken + 1))
        start = min(length - 1, round(first / factor))
        parts.append((start, max(1, min(length - start, round(taken / factor))), taken))
    (top, height, rows), (left, width, columns) = parts
    return ResizedCrop(box=Box(top, left, height, width), size=(rows, columns))


def pad(image: Tensor, side: int, fill: Sequence[float]) -> Tensor:
    """Pad (channels, rows, columns) to a square, at the right and bottom."""
    if image.shape[1:] == (side, side):
        return image
    padded = torch.empty(image.shape[0], side, side, dtype=image.dtype)
    padded[:] = torch.tensor(fill).to(image.dtype).view(-1, 1, 1)
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def fill_values(mean: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Return the stored value of each channel that becomes 0 by normalisation."""
    scale = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(dtype, 1.0)
    return [scale * value for value in mean]


@dataclass(frozen=True, kw_only=True)
class TrainSegmentationTransform:
    """Random scale, crop, flip and photometric distortion."""

    data: SegmentationCropSettings
    seed: int
    labels: LabelMapReader
    mean: tuple[float, ...]
    channels: int = 3

    def __call__(self, raw: LabelledImage, address: Address) -> Sample:
        """Return the sample of this epoch."""
        decoded = decode_image(raw, channels=self.channels, settings=self.data)
        labels = self.labels(raw.labels, decoded.pixels.shape, raw.image)
        rng = numpy_stream("dense crop", self.seed, address.epoch, raw.name)
        data = self.data
        factor = rng.uniform(*data.scale) * _factor(labels.shape, data.short_side)
        for _ in range(CROP_ATTEMPTS):
            crop = draw_crop(labels.shape, data.image_size, factor, rng)
            classes = crop.nearest(labels)
            if _largest_share(classes) <= data.largest_class:
                break
        image = crop.image(decoded.pixels)
        if rng.random() < data.flip:
            image, classes = image.flip(-1), classes[:, ::-1]
        if data.photometric and image.dtype == torch.uint8 and self.channels == 3:
            image = distort(image, rng)
        image = pad(image, data.image_size, fill_values(self.mean, image.dtype))
        target = pad(torch.from_numpy(classes.copy())[None], data.image_size, [IGNORED])[0]
        turned = unsure_frame(raw.image, labels.shape)
        return Sample(
            image,
            None,
            -1,
            repaired=decoded.repaired,
            turned=turned,
            targets=ClassMap.of(target),
        )


@dataclass(frozen=True, kw_only=True)
class EvalSegmentationTransform:
    """The whole image at evaluation size, and its label map at the original size."""

    data: SegmentationCropSettings
    labels: LabelMapReader
    channels: int = 3

    def __call__(self, raw: LabelledImage, address: Address) -> Sample:
        """Return the sample for evaluation."""
        del address
        decoded = decode_image(raw, channels=self.channels, settings=self.data)
        labels = self.labels(raw.labels, decoded.pixels.shape, raw.image)
        image = scale_image(decoded.pixels, _factor(labels.shape, self.data.short_side))
        target = ClassMap.of(torch.from_numpy(labels))
        turned = unsure_frame(raw.image, labels.shape)
        return Sample(image, None, -1, repaired=decoded.repaired, turned=turned, targets=target)


def scale_image(pixels: NDArray[Any], factor: float) -> Tensor:
    """Return the whole image, scaled: (channels, rows, columns)."""
    height, width = pixels.shape[:2]
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return resize(pixels, Box(0, 0, height, width), size)


def _factor(shape: tuple[int, ...], short_side: int | None) -> float:
    return 1.0 if short_side is None else short_side / min(shape[:2])


def _largest_share(classes: NDArray[np.uint8]) -> float:
    counts = np.bincount(classes.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / max(1, counts.sum()))


def distort(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue at random, each with probability 0.5.

    Args:
        image: uint8 (3, rows, columns).
        rng: random stream; every call draws the same number of values.
    """
    applied = rng.random(5) < 0.5
    brightness = rng.uniform(-32, 32)
    contrast, saturation = rng.uniform(0.5, 1.5, 2)
    hue = round(rng.uniform(-18, 18) * 256 / 180)
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    if applied[0]:
        pixels = pixels + np.float32(brightness)
    if applied[1] and applied[4]:
        pixels = pixels * np.float32(contrast)
    if applied[2] or applied[3]:
        colours = np.array(Image.fromarray(_bytes(pixels)).convert("HSV"))
        if applied[2]:
            colours[..., 1] = _bytes(colours[..., 1] * np.float32(saturation))
        if applied[3]:
            colours[..., 0] = (colours[..., 0].astype(np.int64) + hue) % 256
        pixels = np.array(Image.fromarray(colours, "HSV").convert("RGB")).astype(np.float32)
    if applied[1] and not applied[4]:
        pixels = pixels * np.float32(contrast)
    return torch.from_numpy(_bytes(pixels)).permute(2, 0, 1)


def _bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.rint(values).clip(0, 255).astype(np.uint8)
    return rounded
