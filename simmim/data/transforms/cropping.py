"""Crops of images, resized bicubically with antialiasing in their stored type."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ROUNDING = 1e-6
"""Pixels by which the product of a whole number and a fraction may be less than a whole number."""


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop(
    pixels: NDArray[Any],
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Return a random crop of an image, resized; see `random_box` and `resize`."""
    return resize(pixels, random_box(pixels.shape, rng, scale=scale, ratio=ratio), size)


def center_crop_resize(
    pixels: NDArray[Any], size: tuple[int, int], *, crop_pct: float = 1.0
) -> Tensor:
    """Return the centre crop of an image, resized; see `central_box` and `resize`."""
    return resize(pixels, central_box(pixels.shape, size, crop_pct=crop_pct), size)


def random_box(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Draw a random crop of an image of this shape, (rows, columns, …).

    Its area is drawn from `scale`, as a fraction of the image's; its aspect ratio (width / height)
    from `ratio`, uniformly in the logarithm. As torchvision's RandomResizedCrop.
    """
    height, width = shape[:2]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return Box(top, left, crop_height, crop_width)
    # No such crop fits: the largest central one of an allowed ratio.
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return _centred(height, width, crop_height, crop_width)


def central_box(shape: tuple[int, ...], size: tuple[int, int], *, crop_pct: float) -> Box:
    """Return the centre crop of an image of this shape, (rows, columns, …).

    Equivalent to scaling the image until it just covers `size / crop_pct` and cropping the centre,
    but the crop comes first, so that elongated images need no large intermediate one. Its sides are
    rounded down, as in transformers' PerceiverImageProcessor, by which exports do the same.
    """
    height, width = shape[:2]
    side = crop_pct * min(height / size[0], width / size[1])  # source pixels per output pixel
    crop_width = min(width, max(1, math.floor(size[1] * side + ROUNDING)))
    crop_height = min(height, max(1, math.floor(size[0] * side + ROUNDING)))
    return _centred(height, width, crop_height, crop_width)


def _centred(height: int, width: int, crop_height: int, crop_width: int) -> Box:
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def resize(pixels: NDArray[Any], box: Box, size: tuple[int, int]) -> Tensor:
    """Crop an image and resize the crop: bicubic, antialiased.

    Args:
        pixels: (rows, columns, channels).
        box: the crop.
        size: rows and columns of the result.

    Returns:
        (channels, rows, columns), channels last in memory. The type is kept (uint8 and uint16 are
        rounded), except that float64 becomes float32.
    """
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    dtype = part.dtype
    if dtype.kind == "f" and dtype.itemsize == 8:
        dtype = np.dtype(np.float32)
    if part.shape[:2] == size:
        return torch.from_numpy(part.astype(dtype)).permute(2, 0, 1)
    if dtype != np.uint8:
        resized = _interpolate(part.astype(np.float32), size)
        if dtype == np.uint16:
            resized = resized.round_().clamp_(0, 65535)
        return resized if dtype == np.float32 else resized.to(_TORCH_TYPES[dtype.name])
    return _interpolate(part if part.flags.writeable else part.copy(), size)


_TORCH_TYPES = {"uint16": torch.uint16, "float16": torch.float16}


def _interpolate(part: NDArray[Any], size: tuple[int, int]) -> Tensor:
    # The batch axis is added first, so that torch sees channels last and takes its faster path.
    images = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)[0]
