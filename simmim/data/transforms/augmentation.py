"""RandAugment, colour jitter and random erasing of one image, as functions of a random stream.

Data workers apply them to the cropped 8-bit image with Pillow. The published recipes were trained
with Pillow's operations too (through timm), so levels, fill colours and rounding match; and all
randomness comes from the given stream. kornia (on the device) and torchvision draw from a global
generator, so results would depend on ranks and workers, and both round differently. Random erasing
writes its noise in 8 bits, clipped at black and white.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from simmim.data.transforms.settings import MAX_LEVEL, AugmentationSettings

Recoloring = Literal["autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add"]
Operation = (
    Recoloring
    | Literal["color", "contrast", "brightness", "sharpness"]
    | Literal["rotate", "shear_x", "shear_y", "translate_x", "translate_y"]
)

OPERATIONS: tuple[Operation, ...] = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""The operations of RandAugment: the set whose strength increases with the level (`inc1`)."""

APPLY_PROBABILITY = 0.5
"""Probability that a drawn operation is applied (as in timm)."""
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10

ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augments one image."""

    settings: AugmentationSettings
    mean: tuple[float, ...]
    """Mean of each channel, 0 to 1: the fill colour, and the mean of the erasing noise."""
    std: tuple[float, ...]
    """Standard deviation of the erasing noise per channel."""

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the augmented image; both are uint8 (channels, height, width)."""
        settings = self.settings
        if settings.rand_magnitude is not None or settings.color_jitter:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            if settings.rand_magnitude is not None:
                image = self._rand_augment(image, rng)
            else:
                image = color_jitter(image, settings.color_jitter, rng)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if settings.erasing and rng.random() < settings.erasing:
            pixels = erase(pixels, self.mean, self.std, rng)
        return pixels

    def _rand_augment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        settings = self.settings
        assert settings.rand_magnitude is not None
        fill = tuple(min(255, round(255 * value)) for value in self.mean)
        for index in rng.integers(len(OPERATIONS), size=settings.rand_operations).tolist():
            applied = rng.random() < APPLY_PROBABILITY
            level = rng.normal(settings.rand_magnitude, settings.rand_std)
            sign = 1.0 if rng.random() < 0.5 else -1.0
            if applied:
                level = min(max(level, 0.0), MAX_LEVEL)
                image = apply_operation(image, OPERATIONS[index], level, sign, fill)
        return image


def apply_operation(
    image: Image.Image,
    operation: Operation,
    level: float,
    sign: float,
    fill: tuple[int, ...],
) -> Image.Image:
    """Apply one operation of RandAugment; source of the levels: timm's `auto_augment`, `inc1`.

    Args:
        image: RGB.
        operation: one of OPERATIONS.
        level: strength, 0 to 10.
        sign: direction of operations that have one, 1 or -1.
        fill: colour of pixels from outside the image.
    """
    share = level / MAX_LEVEL
    width, height = image.size
    match operation:
        case "rotate":
            degrees = sign * share * 30.0
            return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=fill)
        case "shear_x":
            matrix = (1.0, sign * share * 0.3, 0.0, 0.0, 1.0, 0.0)
        case "shear_y":
            matrix = (1.0, 0.0, 0.0, sign * share * 0.3, 1.0, 0.0)
        case "translate_x":
            matrix = (1.0, 0.0, sign * share * 0.45 * width, 0.0, 1.0, 0.0)
        case "translate_y":
            matrix = (1.0, 0.0, 0.0, 0.0, 1.0, sign * share * 0.45 * height)
        case "color" | "contrast" | "brightness" | "sharpness":
            return ENHANCERS[operation](image).enhance(max(0.1, 1.0 + sign * share * 0.9))
        case other:
            return _recolored(image, other, share)
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=fill,
    )


def _recolored(image: Image.Image, operation: Recoloring, share: float) -> Image.Image:
    """Apply an operation without direction, at `share` of its maximum strength."""
    match operation:
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "posterize":
            return ImageOps.posterize(image, 4 - int(share * 4))
        case "solarize":
            return ImageOps.solarize(image, 256 - min(256, int(share * 256)))
        case "solarize_add":
            added = min(128, int(share * 110))
            table = [min(255, value + added) if value < 128 else value for value in range(256)]
            return image.point(table * len(image.getbands()))


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation in random order.

    Each by a random factor from 1 - strength to 1 + strength.
    """
    names = ("brightness", "contrast", "color")
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, len(names)).tolist()
    for index in np.argsort(rng.random(len(names))).tolist():
        image = ENHANCERS[names[index]](image).enhance(factors[index])
    return image


def erase(
    pixels: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rng: np.random.Generator,
) -> Tensor:
    """Replace a random rectangle of uint8 (channels, height, width) by noise.

    Source: timm's random erasing (`pixel`): 2 % to 1/3 of the area, aspect ratio 0.3 to 1/0.3. The
    image is unchanged if no rectangle fits in ten attempts. `mean` and `std` are the noise's.
    """
    channels, height, width = pixels.shape
    low, high = (math.log(value) for value in ERASED_RATIO)
    for _ in range(ERASING_ATTEMPTS):
        area = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(low, high))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top = int(rng.integers(height - rows + 1))
            left = int(rng.integers(width - columns + 1))
            noise = rng.standard_normal((channels, rows, columns), dtype=np.float32)
            values = noise * np.array(std).reshape(-1, 1, 1) + np.array(mean).reshape(-1, 1, 1)
            erased = pixels.clone()
            erased[:, top : top + rows, left : left + columns] = torch.from_numpy(
                (values * 255).round().clip(0, 255).astype(np.uint8)
            )
            return erased
    return pixels
