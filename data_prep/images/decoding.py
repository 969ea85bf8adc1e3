"""Decoding: the one place where a file becomes pixels, for `data-prep` and for training.

JPEG is decoded by libjpeg-turbo through simplejpeg, which returns the same bytes as Pillow, faster;
whatever simplejpeg does not support, and everything if it is not installed, by Pillow. TIFF is
decoded by Pillow or tifffile, see `data_prep.images.tiff`. Arrays (`.npy`) are read as they are,
and never unpickled.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from data_prep.images.arrays import ArrayError, read_header, read_values
from data_prep.images.damage import DamageError, decode_jpeg, read_jpeg_header
from data_prep.images.deep_png import is_deep_png, read_deep_png, to_channels
from data_prep.images.headers import grey_maximum, jpeg2000_shift, truncated_bit_depth
from data_prep.images.jpeg2000 import (
    DepthError,
    check_values,
    has_alpha,
    is_jpeg2000,
    scale_few_bits,
)
from data_prep.images.opening import (
    FORMATS,
    UnknownFormatError,
    load,
    open_picture,
    silence_libtiff,
)
from data_prep.images.orientation import (
    orientation_of,
    orientation_transpose,
    turn_array,
    turn_upright,
)
from data_prep.images.tiff import check_layout, read_tiff, reads_right
from data_prep.images.tiff_layout import STARTS, TiffError, TiffLayout, read_layout

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels that a picture can be decoded to."""
Loaded = Image.Image | NDArray[Any]
"""Pixels of a picture: an `Image` of 8 bits, or an array of (rows, columns) or (rows, columns,
bands) if there are more bits or bands. An array of uint16 with two axes is a grey picture."""

_JPEG_START = b"\xff\xd8\xff"
_SCAN = 0xDA
_COLOUR_SPACES = ("YCbCr", "Gray", "RGB")
"""JPEG colour spaces that simplejpeg converts exactly as Pillow does."""
_ORIENTATION_MARKERS = (b"Exif\0\0", b"tiff:Orientation")
"""A JPEG with neither is upright: the orientation is in EXIF or XMP."""


class DecodingError(ValueError):
    """A file cannot be decoded; the message says why, as a clause."""


class DamagedError(DecodingError):
    """A file is damaged, or not an image."""


class TooLargeError(DecodingError):
    """An image has more pixels than allowed; nothing of it was decoded."""

    def __init__(self, width: int, height: int, max_pixels: int) -> None:
        self.size = width, height
        super().__init__(f"it has {width}x{height} pixels, more than --max-pixels {max_pixels:,}")


class ChannelsError(DecodingError):
    """An image has other channels than asked for."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        super().__init__(f"it has {channels} channels")


@dataclass(frozen=True)
class Decoded:
    """The pixels of a file."""

    pixels: NDArray[Any]
    """(rows, columns, channels), in native byte order."""
    repaired: str | None = None
    """Defect of a damaged file that could be decoded; some of its pixels may be wrong."""


def decode(data: bytes, extension: str, *, channels: int | None = None, max_pixels: int) -> Decoded:
    """Decode a file: a picture upright, an array as it is.

    Args:
        data: content of the file.
        extension: file name extension; npy distinguishes arrays from pictures, whose format is
            detected from the bytes.
        channels: channels of the result. A picture is converted to 1 (grey), 3 (colour) or 4
            (colour, alpha); an array must have as many. None: 1 or 3 for a picture, all of an
            array. Transparent parts become white unless 4 channels keep them.
        max_pixels: largest rows x columns that are decoded.

    Returns:
        uint8 for pictures of 8 bits, uint16 for those of 16, arrays and TIFFs of many bands or of
        other types as they are; see `read_tiff`.

    Raises:
        TooLargeError: it has too many pixels.
        ChannelsError: an array, or a TIFF of many bands, has other channels.
        DecodingError: it is damaged, or not an image.
    """
    if extension == "npy":
        return Decoded(_exactly(_read_array(data, max_pixels), channels))
    defect = None
    try:
        pixels = _decode_jpeg(data, channels, max_pixels)
        if pixels is not None:
            return Decoded(pixels)
    except DamageError as error:
        defect = str(error)
    loaded = load_picture(data, max_pixels=max_pixels)
    if isinstance(loaded, np.ndarray) and is_deep_png(data):
        if channels not in (None, *MODES):
            raise ChannelsError(3)
        return Decoded(to_channels(loaded, channels or 3))
    if isinstance(loaded, Image.Image):
        # CMYK in JPEG is converted without its profile, as it always was.
        if loaded.mode == "LAB" or (loaded.mode == "CMYK" and not data.startswith(_JPEG_START)):
            loaded = to_srgb(loaded)
        return Decoded(image_to_array(_to_channels(loaded, channels)), defect)
    if loaded.ndim == 2 and loaded.dtype == np.uint16:
        return Decoded(_spread_grey(loaded, channels))
    return Decoded(_exactly(loaded, channels))


def load_picture(data: bytes, *, max_pixels: int, formats: tuple[str, ...] = FORMATS) -> Loaded:
    """Decode a picture upright, with every value it has; only the first frame or page.

    Raises:
        TooLargeError, DecodingError: see `decode`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # relevant problems raise; the others flood the console
        try:
            if data.startswith(STARTS):
                layout = read_layout(data)
                check_size(layout.width, layout.height, max_pixels)
                check_layout(layout, max_pixels)
                return load_tiff(data, layout)
            opened = open_picture(data, formats)
            check_size(opened.width, opened.height, max_pixels)
            if is_deep_png(data):
                return turn_array(read_deep_png(data), orientation_of(opened))
            check_depth(opened, data)
            return wide_values(turn_upright(load(opened, data)), data)
        except (DecodingError, MemoryError):
            raise
        except (DepthError, TiffError) as error:
            raise DecodingError(str(error)) from None
        except UnknownFormatError as error:
            raise DamagedError(str(error)) from error
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception as error:
            raise DamagedError(f"it cannot be decoded: {reason_of(error)}") from error


def load_tiff(data: bytes, layout: TiffLayout) -> Loaded:
    """Decode a TIFF of a layout that was checked, upright.

    Raises:
        TiffError: it cannot be decoded with the right values.
        Exception: nearly any type, on hostile bytes.
    """
    if reads_right(layout):
        silence_libtiff()
        try:
            image = turn_upright(load(open_picture(data, ("TIFF",)), data))
        except OSError as error:
            raise TiffError(
                f"it is {layout}, whose data is damaged or truncated: {reason_of(error)}"
            ) from None
        if image.mode == "P" and not layout.is_deep_palette:
            image.putpalette(layout.palette.tobytes())
        if image.mode == "I":
            values = np.asarray(image)
            return values.astype(np.float32 if max(layout.bits) <= 16 else np.float64)
        return wide_values(image, data)
    values = read_tiff(data, layout)
    size = values.shape[1], values.shape[0]
    if layout.is_premultiplied and values.dtype == np.uint8:
        return Image.frombytes("RGBA", size, values.tobytes(), "raw", "RGBa")
    if values.dtype != np.uint8 or not layout.colours:
        return values
    return Image.frombytes(layout.colours, size, values.tobytes())


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise TooLargeError if an image has too many pixels."""
    if width * height > max_pixels:
        raise TooLargeError(width, height, max_pixels)


def check_depth(image: Image.Image, data: bytes, *, accept_8_bits: bool = False) -> int:
    """Return the bits per channel of a file of which Pillow reads 8, or 0 if it reads all.

    Args:
        image: the opened file; its pixels are not loaded.
        data: the file.
        accept_8_bits: whether 8 bits are enough.

    Raises:
        DecodingError: they are not.
        DepthError: its values are signed, or of colours that are not read.
    """
    check_values(data)
    bits = truncated_bit_depth(image, data)
    if bits and not accept_8_bits:
        raise DecodingError(
            f"it has {bits} bits per colour channel, of which 8 would be left: convert it to an "
            "array (.npy), or accept 8 bits with `data-prep shard --format jpeg` or webp"
        )
    return bits


def reason_of(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def image_to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return a writable copy of a Pillow image's pixels, (rows, columns, channels)."""
    pixels: NDArray[np.uint8] = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return a picture of 8 bits in mode L, RGB or RGBA; transparency is on white but in RGBA."""
    if image.mode == mode and not (mode != "RGBA" and image.has_transparency_data):
        return image
    if image.mode == "La":
        image = image.convert("LA")  # the only mode Pillow converts it to
    if image.has_transparency_data and mode != "RGBA":
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert(mode)


def to_srgb(image: Image.Image) -> Image.Image:
    """Return a CMYK or LAB picture in RGB, through its ICC profile if that fits."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    converted = None
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except ImageCms.PyCMSError:
            pass  # the profile is damaged or of another colour space
    return image.convert("RGB") if converted is None else converted


def _decode_jpeg(data: bytes, channels: int | None, max_pixels: int) -> NDArray[Any] | None:
    """Decode a JPEG by simplejpeg; None if it cannot or gives other pixels than Pillow."""
    header = read_jpeg_header(data)
    if header is None:
        return None
    width, height, colours = header
    check_size(width, height, max_pixels)
    if colours not in _COLOUR_SPACES:
        return None
    pixels = decode_jpeg(data, (width, height))
    if pixels is None:
        return None
    method = None
    head = data[: _header_length(data)]
    if any(marker in head for marker in _ORIENTATION_MARKERS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid EXIF
            method = orientation_transpose(open_picture(data))
    if method is None and pixels.shape[2] == (channels or pixels.shape[2]):
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    turned = image if method is None else image.transpose(method)
    return image_to_array(_to_channels(turned, channels))


def _header_length(data: bytes) -> int:
    """Return the offset of the first scan of a JPEG file; all metadata comes before it."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] != _SCAN:
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    found = offset + 4 <= len(data) and data[offset] == 0xFF
    return offset if found else len(data)  # fill bytes, for example: search the whole file


def _read_array(data: bytes, max_pixels: int) -> NDArray[Any]:
    try:
        header = read_header(data)
        check_size(header.shape[1], header.shape[0], max_pixels)
        return read_values(data, header).astype(header.stored_type, copy=False)
    except ArrayError as error:
        raise DecodingError(str(error)) from None


def _exactly(values: NDArray[Any], channels: int | None) -> NDArray[Any]:
    """Return an array with three axes, whose channels must be those asked for."""
    values = values[..., None] if values.ndim == 2 else values
    if channels not in (None, values.shape[2]):
        raise ChannelsError(values.shape[2])
    return values


def _spread_grey(values: NDArray[np.uint16], channels: int | None) -> NDArray[Any]:
    """Return a grey picture of 16 bits with that many channels, the fourth opaque."""
    if channels in (None, 1):
        return values[..., None]
    if channels not in MODES:
        raise ChannelsError(1)
    spread = np.repeat(values[..., None], channels, axis=2)
    if channels == 4:
        spread[..., 3] = 65_535
    return spread


def wide_values(image: Image.Image, data: bytes) -> Loaded:
    """Return the values of a picture of more than 8 bits as stored, any other as a picture of 8.

    Args:
        image: the loaded picture; Pillow scales some formats to 16 bits.
        data: its file.

    Raises:
        DepthError: the components of a JPEG 2000 are in another order than Pillow's.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16) >> jpeg2000_shift(data)
    if image.mode == "F":
        return np.asarray(image).astype(np.float32)
    if image.mode == "I":
        values = np.asarray(image)
        highest = grey_maximum(data)
        if highest is not None:
            values = np.rint(values * (highest / 65_535)).astype(np.int32)
        holds = values.min() >= 0 and values.max() < 2**16
        return values.astype(np.uint16 if holds else np.float64)
    if not is_jpeg2000(data):
        return image
    scaled = scale_few_bits(image, data)
    if scaled.mode == "P" or has_alpha(data) or scaled.mode not in ("LA", "RGBA"):
        return scaled
    return np.array(scaled)


def _to_channels(image: Image.Image, channels: int | None) -> Image.Image:
    if channels is None:
        channels = 1 if image.mode in ("1", "L") and not image.has_transparency_data else 3
    if channels not in MODES:
        raise ChannelsError(len(image.getbands()))
    return to_mode(image, MODES[channels])
