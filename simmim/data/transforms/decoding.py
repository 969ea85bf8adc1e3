"""From the bytes of a member to an array of pixels, by the fastest way that loses nothing.

JPEG goes through libjpeg-turbo by way of simplejpeg, which gives the bytes that Pillow gives, in
less time. What simplejpeg does not take, and all of it where it is not installed, goes through
Pillow. Arrays (`.npy`) are taken as they are, and never unpickled.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.images.arrays import ArrayError, read_header, read_values
from simmim.data.order.errors import BadSampleError
from simmim.data.transforms.pillow_decoding import (
    MAX_PIXELS,
    MODES,
    check_channels,
    decode,
    to_mode,
    too_large,
    turning,
)

try:
    import simplejpeg
except ImportError:  # Pillow alone does
    simplejpeg = None

ARRAY_EXTENSION = "npy"

JPEG_START = b"\xff\xd8\xff"

START_OF_SCAN = 0xDA

FAST_COLOURS = ("YCbCr", "Gray", "RGB")
"""Colour spaces of JPEG files that simplejpeg turns into RGB as Pillow does."""

MAY_BE_TURNED = (b"Exif\0\0", b"tiff:Orientation")
"""A JPEG file with neither of these is upright: an orientation stands in Exif or in XMP."""


@dataclass(frozen=True)
class Decoded:
    """The pixels of one sample."""

    pixels: np.ndarray
    """(rows, columns, channels): uint8, or the type of an array, in the machine's byte order."""
    repaired: str | None = None
    """What is wrong with a file that was read all the same: some of its pixels may be wrong."""


def decode_pixels(
    data: bytes, extension: str, *, channels: int = 3, max_pixels: int = MAX_PIXELS
) -> Decoded:
    """Return the pixels of a member: of an image upright, of an array as they are.

    Args:
        data: the whole member.
        extension: of its name; decides between images and arrays.
        channels: of the result; 1 (grey), 3 (colour) or 4 (transparency too) for images.
        max_pixels: rows times columns of the largest that is decoded.

    Raises:
        BadSampleError: the member is damaged, too large, or an array of other channels.
        DataError: no image has that many channels.
    """
    if extension == ARRAY_EXTENSION:
        return Decoded(read_array(data, channels=channels, max_pixels=max_pixels))
    check_channels(channels)
    refusal = None
    if simplejpeg is not None and data.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if width * height > max_pixels:
                raise too_large(width, height, max_pixels)
            if colours in FAST_COLOURS:
                pixels = simplejpeg.decode_jpeg(data, "RGB")
                return Decoded(_as_pillow_would(pixels, data, channels))
        except BadSampleError:
            raise
        except ValueError as error:
            refusal = str(error)
    image = decode(data, channels=channels, max_pixels=max_pixels)
    return Decoded(as_pixels(image), refusal)


def as_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of a Pillow image, (rows, columns, channels), to be written to."""
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _as_pillow_would(pixels: np.ndarray, data: bytes, channels: int) -> np.ndarray:
    """Turn RGB pixels as the file's orientation says, and bring them to the channels."""
    method = None
    head = data[: _length_of_head(data)]
    if any(mark in head for mark in MAY_BE_TURNED):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Exif that is no good
            method = turning(Image.open(io.BytesIO(data)))
    if channels == 3 and method is None:
        return pixels
    image = Image.fromarray(pixels)
    turned = image if method is None else image.transpose(method)
    return as_pixels(to_mode(turned, MODES[channels]))


def _length_of_head(data: bytes) -> int:
    """Return where the first scan of a JPEG file begins; all that describes it comes before."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != START_OF_SCAN:
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    known = place + 4 <= len(data) and data[place] == 0xFF
    return place if known else len(data)  # filling bytes, for example: all of it is looked through


def read_array(data: bytes, *, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the array of a `.npy` file, (rows, columns, channels), in the machine's byte order.

    Nothing is allocated before the header and the length of the file fit together. Raises
    BadSampleError where they do not, where the array is no image, or is one of other channels.
    """
    try:
        header = read_header(data)
    except ArrayError as error:
        raise BadSampleError(f"the array cannot be used: {error}") from None
    height, width = header.shape[:2]
    if height * width > max_pixels:
        raise too_large(width, height, max_pixels)
    if header.channels != channels:
        raise BadSampleError(
            f"the array has {header.channels} channels, and in_channels is {channels}"
        )
    array = read_values(data, header).reshape(height, width, channels)
    array = array.astype(header.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSampleError("the array has values that are no finite numbers")
    return array
