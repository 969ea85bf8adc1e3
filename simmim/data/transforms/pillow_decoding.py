"""Encoded images of every form and mode that Pillow reads, upright, in the channels asked for."""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from simmim.data.order.errors import BadSampleError, DataError

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
    """Raise DataError unless images can be decoded to this many channels."""
    if channels not in MODES:
        raise DataError(
            f"images have 1 (grey), 3 (colour) or 4 channels (with transparency), not {channels}:"
            " change in_channels, or shard arrays (.npy) of that many"
        )


def too_large(width: int, height: int, max_pixels: int) -> BadSampleError:
    """Return the error for an image of more pixels than are allowed."""
    return BadSampleError(
        f"the image has {width}x{height} pixels, more than the {max_pixels:,} allowed:"
        " scale it down, or raise max_pixels"
    )


def decode(data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an encoded image upright, in mode L, RGB or RGBA for 1, 3 or 4 channels.

    Transparent parts come out white, unless there are 4 channels to keep them. Numbers beyond
    8 bits are scaled, not cut off. Raises BadSampleError on damaged files, and on images of more
    than `max_pixels` before they are decoded.
    """
    check_channels(channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters raises; the rest would flood the console
        try:
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height <= max_pixels:
                image.load()
                method = turning(image)
                turned = image if method is None else image.transpose(method)
                return to_mode(turned, MODES[channels])
        except Image.DecompressionBombError as error:
            raise BadSampleError(f"the image is too large, scale it down: {error}") from None
        except UnidentifiedImageError:
            raise BadSampleError("the image is damaged or of no known format") from None
        except DAMAGED as error:
            raise BadSampleError(f"the image is damaged: {error}") from error
    raise too_large(width, height, max_pixels)


def turning(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image as its EXIF orientation says; unreadable EXIF says nothing."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION_TAG, 1))
    except DAMAGED:
        return None


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
