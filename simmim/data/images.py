"""Encoded images to uint8 tensors: decoding of every Pillow mode, random and central crops."""

import io
import math
import struct
import warnings
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from simmim.data.errors import DataError

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded, and that Pillow agrees to decode."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels that images can have."""

ORIENTATION_TAG = 0x0112

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright."""

DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on files that are not whole or not images."""


def check_channels(channels: int) -> None:
    """Raise ValueError unless images can be decoded to this many channels."""
    if channels not in MODES:
        raise ValueError(
            f"images have 1 (grey), 3 (colour) or 4 channels (with transparency), not {channels}:"
            " change in_channels"
        )


def decode(data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an encoded image upright, in mode L, RGB or RGBA for 1, 3 or 4 channels.

    Transparent parts come out white, unless there are 4 channels to keep them. Numbers beyond
    8 bits are scaled, not cut off. Raises DataError on damaged files, and on images of more than
    `max_pixels` before they are decoded.
    """
    check_channels(channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters raises; the rest would flood the console
        try:
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height <= max_pixels:
                image.load()
                return to_mode(_upright(image), MODES[channels])
        except Image.DecompressionBombError as error:
            raise DataError(f"the image is too large, scale it down: {error}") from None
        except UnidentifiedImageError:
            raise DataError("the image is damaged or of no known format") from None
        except DAMAGED as error:
            raise DataError(f"the image is damaged: {error}") from error
    raise DataError(
        f"the image has {width}x{height} pixels, more than the {max_pixels:,} allowed:"
        " scale it down, or raise max_pixels"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; unreadable EXIF says nothing."""
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION_TAG, 1))
    except DAMAGED:
        return image
    return image if method is None else image.transpose(method)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in mode L, RGB or RGBA."""
    if image.mode == mode and not (mode != "RGBA" and image.has_transparency_data):
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode)).convert(mode)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        profile = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        image = ImageCms.applyTransform(image, profile) or image
    if image.mode == "La":
        image = image.convert("LA")  # the one mode Pillow takes it to
    if image.has_transparency_data and mode != "RGBA":
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert(mode)


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale numbers of 16 or more bits to 0 … 255.

    16-bit modes by their full range. Others by the smallest of the usual ranges (1 for
    fractions, 255, 65535) that holds all values, else from their least to their greatest.
    """
    wide = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(wide.min()), float(wide.max())
    if mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        ranges = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(limit for limit in ranges if high <= limit)
    scaled = (wide - low) * (255.0 / max(high - low, 1e-12))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Tensor:
    """Return a random part of the image, resized, uint8 of (channels, rows, columns) `size`.

    The part has an area of `scale` of the image and a width-to-height `ratio`, drawn evenly on
    the logarithm; it is mirrored with probability `flip`. As torchvision's RandomResizedCrop.
    """
    width, height = image.size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        part_width = round(math.sqrt(area * aspect))
        part_height = round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = int(rng.integers(width - part_width + 1))
            top = int(rng.integers(height - part_height + 1))
            break
    else:  # no part of that shape fits: the largest central one of a legal ratio
        part_width = min(width, max(1, round(height * ratio[1])))
        part_height = min(height, max(1, round(width / ratio[0])))
        left, top = (width - part_width) // 2, (height - part_height) // 2
    part = _resized(image, (left, top, left + part_width, top + part_height), size)
    return part.flip(-1) if rng.random() < flip else part


def center_crop_resize(
    image: Image.Image, size: tuple[int, int], *, crop_pct: float = 1.0
) -> Tensor:
    """Return the middle of the image, resized, uint8 of (channels, rows, columns) `size`.

    As scaling the image until it just covers `size / crop_pct` and taking the middle, but the
    part is cut out first, so that no shape of image makes a large intermediate one.
    """
    width, height = image.size
    pixels = crop_pct * min(height / size[0], width / size[1])  # of the image, for one of ours
    part_width = min(width, max(1, round(size[1] * pixels)))
    part_height = min(height, max(1, round(size[0] * pixels)))
    left, top = (width - part_width) // 2, (height - part_height) // 2
    return _resized(image, (left, top, left + part_width, top + part_height), size)


def _resized(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """Cut out (left, top, right, bottom) and resize it: bicubic, antialiased, uint8."""
    pixels = torch.from_numpy(np.array(image.crop(box)))
    planes = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if tuple(planes.shape[-2:]) == size:
        return planes.contiguous()
    resized = F.interpolate(planes[None], size=size, mode="bicubic", antialias=True)[0]
    return resized.contiguous()
