"""Parts of images, cut out before they are resized: bicubic, antialiased, in the type they have."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop(
    pixels: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Return a random part of an image, resized; see `random_box` and `resize`."""
    return resize(pixels, random_box(pixels.shape, rng, scale=scale, ratio=ratio), size)


def center_crop_resize(
    pixels: np.ndarray, size: tuple[int, int], *, crop_pct: float = 1.0
) -> Tensor:
    """Return the middle of an image, resized; see `central_box` and `resize`."""
    return resize(pixels, central_box(pixels.shape, size, crop_pct=crop_pct), size)


def random_box(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Draw a part of an image of this shape, (rows, columns, …).

    It has an area of `scale` of the image and a width-to-height `ratio`, drawn evenly on the
    logarithm. As torchvision's RandomResizedCrop.
    """
    height, width = shape[:2]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        part_width = round(math.sqrt(area * aspect))
        part_height = round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = int(rng.integers(width - part_width + 1))
            top = int(rng.integers(height - part_height + 1))
            return Box(top, left, part_height, part_width)
    # No part of that shape fits: the largest central one of a legal ratio.
    part_width = min(width, max(1, round(height * ratio[1])))
    part_height = min(height, max(1, round(width / ratio[0])))
    return _centred(height, width, part_height, part_width)


def central_box(shape: tuple[int, ...], size: tuple[int, int], *, crop_pct: float) -> Box:
    """Return the middle of an image of this shape, (rows, columns, …).

    As scaling the image until it just covers `size / crop_pct` and taking the middle, but the
    part is cut out first, so that no shape of image makes a large intermediate one.
    """
    height, width = shape[:2]
    side = crop_pct * min(height / size[0], width / size[1])  # in the image, for a pixel of ours
    part_width = min(width, max(1, round(size[1] * side)))
    part_height = min(height, max(1, round(size[0] * side)))
    return _centred(height, width, part_height, part_width)


def _centred(height: int, width: int, part_height: int, part_width: int) -> Box:
    return Box((height - part_height) // 2, (width - part_width) // 2, part_height, part_width)


def resize(pixels: np.ndarray, box: Box, size: tuple[int, int]) -> Tensor:
    """Cut a part out of an image and resize it: bicubic, antialiased.

    Args:
        pixels: (rows, columns, channels).
        box: the part.
        size: rows and columns of the result.

    Returns:
        (channels, rows, columns), channels last in memory. uint8 and uint16 are rounded and stay
        what they are, as do float16 and float32; float64 becomes float32.
    """
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    kind = part.dtype
    if kind.kind == "f" and kind.itemsize == 8:
        kind = np.dtype(np.float32)
    if part.shape[:2] == size:
        return torch.from_numpy(part.astype(kind)).permute(2, 0, 1)
    if kind != np.uint8:
        resized = _interpolate(part.astype(np.float32), size)
        if kind == np.uint16:
            resized = resized.round_().clamp_(0, 65535)
        return resized if kind == np.float32 else resized.to(_TYPES[kind.name])
    return _interpolate(part if part.flags.writeable else part.copy(), size)


_TYPES = {"uint16": torch.uint16, "float16": torch.float16}


def _interpolate(part: np.ndarray, size: tuple[int, int]) -> Tensor:
    # The batch axis comes first, so that torch sees channels last and takes its faster path.
    images = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)[0]
