"""RandAugment, colour jitter and random erasing of one picture, as functions of a random stream.

They are done by the workers, on the cropped picture of 8 bits a channel, with Pillow. The published
recipes were trained with Pillow's operations too (through timm), so levels, fills and rounding are
theirs; Pillow is here for decoding anyway; and all randomness comes from the stream that is handed
in. kornia, on the device, and torchvision draw from a global generator, where a picture's looks
would depend on ranks and workers, and both round otherwise. Random erasing writes its noise in 8
bits, which cuts it off at black and white.
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
"""What RandAugment chooses from: the set whose strength grows with the level (`inc1`)."""

CHANCE = 0.5
"""Probability that a chosen operation is done (code)."""
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASING_TRIES = 10

ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Changes one picture."""

    settings: AugmentationSettings
    mean: tuple[float, ...]
    """Of each channel, 0 to 1: what fills the places that a shift leaves, and the noise's mean."""
    std: tuple[float, ...]
    """Of the noise that erases."""

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a picture changed at random: uint8 (channels, height, width), as it came."""
        chosen = self.settings
        if chosen.rand_magnitude is not None or chosen.color_jitter:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            if chosen.rand_magnitude is not None:
                image = self._rand_augment(image, rng)
            else:
                image = color_jitter(image, chosen.color_jitter, rng)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if chosen.erasing and rng.random() < chosen.erasing:
            pixels = erase(pixels, self.mean, self.std, rng)
        return pixels

    def _rand_augment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        chosen = self.settings
        assert chosen.rand_magnitude is not None
        fill = tuple(min(255, round(255 * value)) for value in self.mean)
        for number in rng.integers(len(OPERATIONS), size=chosen.rand_operations).tolist():
            done = rng.random() < CHANCE
            level = rng.normal(chosen.rand_magnitude, chosen.rand_std)
            sign = 1.0 if rng.random() < 0.5 else -1.0
            if done:
                level = min(max(level, 0.0), MAX_LEVEL)
                image = apply_operation(image, OPERATIONS[number], level, sign, fill)
        return image


def apply_operation(
    image: Image.Image,
    operation: Operation,
    level: float,
    sign: float,
    fill: tuple[int, ...],
) -> Image.Image:
    """Do one operation of RandAugment; source of the levels: timm's `auto_augment`, `inc1`.

    Args:
        image: RGB.
        operation: one of OPERATIONS.
        level: strength, 0 to 10.
        sign: 1 or -1, the direction of what has one.
        fill: colour of places that were outside the image.
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
    """Do an operation that has no direction, with `share` of its greatest strength."""
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
    """Change brightness, contrast and saturation by factors from 1 - strength to 1 + strength.

    They come in random order.
    """
    names = ("brightness", "contrast", "color")
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, len(names)).tolist()
    for number in np.argsort(rng.random(len(names))).tolist():
        image = ENHANCERS[names[number]](image).enhance(factors[number])
    return image


def erase(
    pixels: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rng: np.random.Generator,
) -> Tensor:
    """Replace a random rectangle by noise of the channels' mean and standard deviation.

    Source: random erasing as timm does it (`pixel`): 2 % to a third of the area, sides of a ratio
    of 0.3 to 1/0.3. uint8 (channels, height, width) stays as it is where none fits in ten tries.
    """
    channels, height, width = pixels.shape
    low, high = (math.log(value) for value in ERASED_RATIO)
    for _ in range(ERASING_TRIES):
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
