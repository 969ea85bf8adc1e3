"""Images looked at before they are kept: format, size, and whether they decode.

The bytes of JPEG, PNG, WebP and plain `.npy` files are kept unless other is asked. Everything else
is written anew, as PNG or as an array, whichever loses nothing.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_prep.images.arrays import (
    MAGIC,
    ArrayError,
    ArrayHeader,
    count_nan,
    read_array,
    read_header,
    write_array,
)
from data_prep.images.damage import (
    DamageError,
    check_jpeg,
    check_png,
    check_scans,
    check_webp,
    decode_jpeg,
)
from data_prep.images.encoding import Encoding, encode, turn_upright
from data_prep.images.headers import plain_jpeg_size, truncated_bit_depth

MAX_PIXELS = 89_478_485
"""Largest image taken unless told otherwise, in pixels; Pillow warns of larger ones."""
KEEP = Encoding()
"""The encoding that keeps the bytes of what shards can hold."""
RE_ENCODED = "written anew"
"""Note on a picture whose bytes were not kept."""

_KEPT = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_REWRITTEN = ("AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "TIFF")
_LOSSLESS_WEBP = b"VP8L"


class RejectedImageError(ValueError):
    """An image that must not be kept; the text says why."""


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    """An image that may be kept."""

    data: bytes
    """The file as it is to be stored."""
    extension: str
    """Extension that fits the data: jpg, png, webp or npy."""
    width: int
    """Columns as stored, before any EXIF orientation."""
    height: int
    """Rows as stored, before any EXIF orientation."""
    notes: tuple[str, ...] = ()
    """What a person should know of it, as short phrases that can be counted."""


def check_image(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
    encoding: Encoding = KEEP,
) -> CheckedImage:
    """Check that an image can be used, and write it anew where it is not what is asked for.

    The format is told from the bytes, whatever the file was called. Of an animation or a file of
    several pages the first picture counts. Arrays are never resized.

    Args:
        data: an image file.
        max_pixels: most pixels an image may have; a larger one is rejected before it is decoded.
        decode: whether to decode the whole image rather than its header alone.
        encoding: size and format that pictures are to have.

    Raises:
        RejectedImageError: the data is no image, is cut or damaged, is too large, or would lose
            more than was asked.
    """
    try:
        checked = _check_plain_jpeg(data, max_pixels, decode, encoding)
        if checked is not None:
            return checked
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, which does not concern the pixels.
            warnings.simplefilter("ignore")
            if data.startswith(MAGIC):
                return _check_array(data, max_pixels, decode)
            return _check_picture(data, max_pixels, decode, encoding)
    except (RejectedImageError, MemoryError):
        raise
    except (ArrayError, DamageError) as error:
        raise RejectedImageError(str(error)) from None
    # Pillow's readers raise nearly any type when the bytes are hostile.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RejectedImageError(f"it does not decode: {reason}") from None


def _check_plain_jpeg(
    data: bytes, max_pixels: int, decode: bool, encoding: Encoding
) -> CheckedImage | None:
    """Check a JPEG that is kept as it is, without Pillow; None where that cannot be done."""
    size = plain_jpeg_size(data)
    if size is None or size[0] * size[1] > min(max_pixels, MAX_PIXELS):
        return None
    if encoding.target_format("jpeg") != "jpeg" or encoding.target_size(*size) != size:
        return None
    if decode:
        check_scans(data, size[0] * size[1])
        if not check_jpeg(data, size):
            return None
    return CheckedImage(data=data, extension="jpg", width=size[0], height=size[1])


def _check_array(data: bytes, max_pixels: int, decode: bool) -> CheckedImage:
    header = read_header(data)
    height, width = header.shape[:2]
    _check_size(width, height, max_pixels)
    notes: tuple[str, ...] = ()
    if decode and count_nan(read_array(data)):
        notes = ("NaN values",)
    return CheckedImage(
        data=_plain_array(data, header), extension="npy", width=width, height=height, notes=notes
    )


def _plain_array(data: bytes, header: ArrayHeader) -> bytes:
    return data if header.is_plain else write_array(read_array(data))


def _check_picture(data: bytes, max_pixels: int, decode: bool, encoding: Encoding) -> CheckedImage:
    Image.init()
    formats = [name for name in (*_KEPT, *_REWRITTEN) if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise RejectedImageError("it is not an image of a known format") from None
    with image:
        _check_size(image.width, image.height, max_pixels)
        own = _KEPT.get(image.format or "")
        target = encoding.target_format(own)
        if own != target or encoding.target_size(*image.size) != image.size:
            return _re_encode(image, data, target, encoding)
        notes = _check_pixels(image, data) if decode else ()
        return CheckedImage(
            data=data,
            extension=_EXTENSIONS[own],
            width=image.width,
            height=image.height,
            notes=notes,
        )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        size = f"{width}x{height}"
        raise RejectedImageError(f"it has {size} pixels, more than --max-pixels {max_pixels:,}")


def _re_encode(image: Image.Image, data: bytes, target: str, encoding: Encoding) -> CheckedImage:
    bits = truncated_bit_depth(image, data)
    notes: tuple[str, ...] = ()
    if bits and target == "png":
        raise RejectedImageError(
            f"it has {bits} bits a channel in colour, of which 8 would be left: make it an array "
            "(.npy), or accept 8 with --format jpeg or webp"
        )
    if bits:
        notes = (f"{bits} bits cut to 8",)
    loaded, found = _load(image, data)
    encoded = encode(loaded, target, encoding, lossless=_LOSSLESS_WEBP in data)
    return CheckedImage(
        data=encoded.data,
        extension=encoded.extension,
        width=encoded.width,
        height=encoded.height,
        notes=(*found, *notes, *encoded.notes, RE_ENCODED),
    )


def _load(image: Image.Image, data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode every pixel, by the strictest way there is; return the picture and notes on it."""
    if _KEPT.get(image.format or "") == "jpeg" and image.mode in ("L", "RGB"):
        check_scans(data, image.width * image.height)
        pixels = decode_jpeg(data, image.size)
        if pixels is not None:
            loaded = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            if loaded.mode == image.mode:
                kept = ("exif", "icc_profile", "xmp")
                loaded.info = {name: image.info[name] for name in kept if name in image.info}
                return loaded, ()
    notes = _check_pixels(image, data)
    image.load()
    return image, notes


def _check_pixels(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """Look for damage by the strictest way there is; return notes on how that went."""
    match _KEPT.get(image.format or ""):
        case "png":
            check_png(data)
        case "webp":
            check_webp(data)
        case "jpeg":
            check_scans(data, image.width * image.height)
            if check_jpeg(data, image.size):
                return ()
    image.load()
    return ("JPEG checked by Pillow alone",) if image.format in ("JPEG", "MPO") else ()


_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_pixels(data: bytes, extension: str) -> NDArray[Any]:
    """Return the values of an image upright, (height, width, channels).

    Pictures have 1 channel of grey or 3 of colour, in uint8, or in uint16 where the file has 16
    bits of grey; transparent parts are white. Arrays are as they were stored.

    Raises:
        RejectedImageError: the image does not decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = read_array(data) if extension == "npy" else _read_picture(data)
        except MemoryError:
            raise
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RejectedImageError(f"it does not decode: {reason}") from None
    return values[..., None] if values.ndim == 2 else values


def _read_picture(data: bytes) -> NDArray[Any]:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
        opened.load()
        image = turn_upright(opened)
    if image.mode in _WIDE_MODES:
        return np.asarray(image).astype(np.uint16)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return np.asarray(Image.alpha_composite(white, seen).convert("RGB"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
