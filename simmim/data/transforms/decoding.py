"""Decoding of encoded images and arrays to pixels, by the fastest lossless way.

JPEG is decoded by libjpeg-turbo through simplejpeg, which returns the same bytes as Pillow, faster.
Whatever simplejpeg does not support, and everything if it is not installed, is decoded by Pillow.
Arrays (`.npy`) are read as they are, and never unpickled.
"""

import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from data_prep.images.arrays import ArrayError, read_header, read_values
from data_prep.images.damage import DAMAGE
from data_prep.images.opening import UnknownFormatError, load, open_picture
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.settings import MAX_PIXELS

try:
    import simplejpeg
except ImportError:  # not installed: Pillow decodes everything
    simplejpeg = None

ARRAY_EXTENSION = "npy"

JPEG_START = b"\xff\xd8\xff"

START_OF_SCAN = 0xDA

FAST_COLOUR_SPACES = ("YCbCr", "Gray", "RGB")
"""JPEG colour spaces that simplejpeg converts to RGB exactly as Pillow does."""

ORIENTATION_MARKERS = (b"Exif\0\0", b"tiff:Orientation")
"""A JPEG file with neither is upright: the orientation is in Exif or XMP."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each supported number of image channels."""

ORIENTATION_TAG = 0x0112

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose that turns an image of each Exif orientation upright."""

DECODING_ERRORS = (
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
"""Exceptions that Pillow raises on truncated files and on files that are not images."""


@dataclass(frozen=True)
class DecodedImage:
    """The pixels of one sample."""

    pixels: NDArray[Any]
    """(rows, columns, channels): uint8, or the type of an array, in native byte order."""
    repaired: str | None = None
    """Defect of a damaged file that could be decoded; some of its pixels may be wrong."""


def decode_pixels(
    data: bytes, extension: str, *, channels: int = 3, max_pixels: int = MAX_PIXELS
) -> DecodedImage:
    """Decode a file: an image upright, an array as it is.

    Args:
        data: content of the file.
        extension: file name extension; distinguishes images and arrays.
        channels: channels of the result; 1 (grey), 3 (colour) or 4 (colour, alpha) for images.
        max_pixels: largest rows · columns that are decoded.

    Raises:
        BadSampleError: the file is damaged, too large, or an array with other channels.
        DataError: images cannot have that many channels.
    """
    if extension == ARRAY_EXTENSION:
        return DecodedImage(read_array(data, channels=channels, max_pixels=max_pixels))
    check_channels(channels)
    defect = None
    if simplejpeg is not None and data.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if width * height > max_pixels:
                raise too_large_error(width, height, max_pixels)
            if colours in FAST_COLOUR_SPACES:
                pixels = simplejpeg.decode_jpeg(data, "RGB")
                return DecodedImage(_orient_and_convert(pixels, data, channels))
        except BadSampleError:
            raise
        except ValueError as error:
            # Other reports concern what simplejpeg does not read, such as unusual sampling.
            defect = str(error) if str(error).startswith(DAMAGE) else None
    image = decode_pillow(data, channels=channels, max_pixels=max_pixels)
    return DecodedImage(image_to_array(image), defect)


def image_to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return a writable copy of a Pillow image's pixels, (rows, columns, channels)."""
    pixels: NDArray[np.uint8] = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _orient_and_convert(pixels: NDArray[np.uint8], data: bytes, channels: int) -> NDArray[np.uint8]:
    """Apply the file's orientation to RGB pixels, and convert them to the channels."""
    method = None
    head = data[: _header_length(data)]
    if any(marker in head for marker in ORIENTATION_MARKERS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid Exif
            method = orientation_transpose(open_picture(data))
    if channels == 3 and method is None:
        return pixels
    image = Image.fromarray(pixels)
    turned = image if method is None else image.transpose(method)
    return image_to_array(to_mode(turned, MODES[channels]))


def _header_length(data: bytes) -> int:
    """Return the offset of the first scan of a JPEG file; all metadata comes before it."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] != START_OF_SCAN:
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    found = offset + 4 <= len(data) and data[offset] == 0xFF
    return offset if found else len(data)  # fill bytes, for example: search the whole file


def read_array(data: bytes, *, channels: int, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """Return the array of a `.npy` file, (rows, columns, channels), in native byte order.

    Nothing is allocated before the header is checked against the length of the file. Raises
    BadSampleError if they do not match, the array is not an image, or has other channels.
    """
    try:
        header = read_header(data)
    except ArrayError as error:
        raise BadSampleError(f"the array cannot be used: {error}") from None
    height, width = header.shape[:2]
    if height * width > max_pixels:
        raise too_large_error(width, height, max_pixels)
    if header.channels != channels:
        raise BadSampleError(
            f"the array has {header.channels} channels, but in_channels is {channels}"
        )
    array: NDArray[Any] = read_values(data, header).reshape(height, width, channels)
    array = array.astype(header.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSampleError("the array has non-finite values (NaN or Inf)")
    return array


def check_channels(channels: int) -> None:
    """Raise DataError unless images can be decoded to this many channels."""
    if channels not in MODES:
        raise DataError(
            f"images have 1 (grey), 3 (colour) or 4 channels (with transparency), not {channels}:"
            " change in_channels, or use arrays (.npy) with that many channels."
        )


def too_large_error(width: int, height: int, max_pixels: int) -> BadSampleError:
    """Return the error for an image with more pixels than allowed."""
    return BadSampleError(
        f"the image has {width}x{height} pixels, more than the {max_pixels:,} allowed:"
        " scale it down, or raise max_pixels"
    )


def decode_pillow(data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image upright with Pillow, to mode L, RGB or RGBA for 1, 3 or 4 channels.

    Transparent parts become white, unless 4 channels keep them. Values of more than 8 bits are
    scaled, not clipped. Raises BadSampleError on damaged files, and on images of more than
    `max_pixels` before they are decoded.
    """
    check_channels(channels)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # relevant problems raise; the others would flood the console
        try:
            opened = open_picture(data)
            width, height = opened.size
            if width * height <= max_pixels:
                image = load(opened, data)
                method = orientation_transpose(image)
                turned = image if method is None else image.transpose(method)
                return to_mode(turned, MODES[channels])
        except UnknownFormatError:
            raise BadSampleError("the image is damaged or of an unknown format") from None
        except DECODING_ERRORS as error:
            raise BadSampleError(f"the image is damaged: {error}") from error
    raise too_large_error(width, height, max_pixels)


def orientation_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose that applies an image's Exif orientation; None if there is none."""
    try:
        return ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG, 1))
    except DECODING_ERRORS:
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
        image = image.convert("LA")  # the only mode Pillow converts it to
    if image.has_transparency_data and mode != "RGBA":
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert(mode)


def _to_bytes(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Scale values of 16 or more bits to 0 … 255.

    16-bit modes by their full range, others by the smallest common range (1 for floating point,
    255, 65535) that contains all values, or else from their minimum to their maximum.
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
