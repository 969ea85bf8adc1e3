"""Image checks before storage: format, size, and whether the image decodes.

The bytes of JPEG, PNG, WebP and plain `.npy` files are kept unless the options ask for something
else. Other formats are re-encoded as PNG or as an array, whichever is lossless. `read_pixels`
decodes stored images.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

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
from data_prep.images.encoding import encode, turn_upright
from data_prep.images.headers import plain_jpeg_size, truncated_bit_depth
from data_prep.images.opening import KEPT, UnknownFormatError, load, open_picture
from data_prep.images.settings import MAX_PIXELS, MAX_READ_PIXELS, Encoding

KEEP = Encoding()
"""Encoding that keeps the bytes of every format that shards can hold."""
RE_ENCODED = "written anew"
"""Note on a picture whose bytes were not kept, as sets on disk have it."""

_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_LOSSLESS_WEBP = b"VP8L"
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class RejectedImageError(ValueError):
    """An image must not be stored; the message says why."""


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    """An image that passed all checks."""

    data: bytes
    """The file to store."""
    extension: str
    """Extension of the data: jpg, png, webp or npy."""
    width: int
    """Columns as stored, before any EXIF orientation."""
    height: int
    """Rows as stored, before any EXIF orientation."""
    notes: tuple[str, ...] = ()
    """Notes on the image, as short phrases to count."""


def check_image(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
    encoding: Encoding = KEEP,
) -> CheckedImage:
    """Check that an image can be used, and re-encode it if the options or its format require it.

    The format is detected from the bytes, whatever the file name. Only the first frame of an
    animation or page of a document is used. Arrays are never resized.

    Args:
        data: an image file.
        max_pixels: maximum number of pixels; a larger image is rejected before it is decoded.
        decode: whether to decode the whole image, or to read its header only.
        encoding: size and format of stored pictures.

    Raises:
        RejectedImageError: the data is not an image, is truncated, damaged or too large, or cannot
            be stored without loss.
    """
    try:
        checked = _check_plain_jpeg(data, max_pixels, decode, encoding)
        if checked is not None:
            return checked
        with warnings.catch_warnings():
            # Pillow warns about odd metadata, which does not affect the pixels.
            warnings.simplefilter("ignore")
            if data.startswith(MAGIC):
                return _check_array(data, max_pixels, decode)
            return _check_picture(data, max_pixels, decode, encoding)
    except (RejectedImageError, MemoryError):
        raise
    except (ArrayError, DamageError, UnknownFormatError) as error:
        raise RejectedImageError(str(error)) from None
    # Pillow's readers raise nearly any type when the bytes are hostile.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RejectedImageError(f"it cannot be decoded: {reason}") from None


def _check_plain_jpeg(
    data: bytes, max_pixels: int, decode: bool, encoding: Encoding
) -> CheckedImage | None:
    """Check a JPEG that is kept as it is without opening it in Pillow; None if that is needed."""
    size = plain_jpeg_size(data)
    if size is None or size[0] * size[1] > max_pixels:
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
    with open_picture(data) as image:
        _check_size(image.width, image.height, max_pixels)
        own = KEPT.get(image.format or "")
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


def _re_encode(
    image: ImageFile.ImageFile, data: bytes, target: str, encoding: Encoding
) -> CheckedImage:
    bits = truncated_bit_depth(image, data)
    notes: tuple[str, ...] = ()
    if bits and target == "png":
        raise RejectedImageError(
            f"it has {bits} bits per colour channel, of which 8 would be left: convert it to an "
            "array (.npy), or accept 8 bits with --format jpeg or webp"
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


def _load(image: ImageFile.ImageFile, data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode every pixel as strictly as possible; return the picture and notes on it."""
    if KEPT.get(image.format or "") == "jpeg" and image.mode in ("L", "RGB"):
        check_scans(data, image.width * image.height)
        pixels = decode_jpeg(data, image.size)
        if pixels is not None:
            loaded = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            if loaded.mode == image.mode:
                kept = ("exif", "icc_profile", "xmp")
                loaded.info = {name: image.info[name] for name in kept if name in image.info}
                return loaded, ()
    notes = _check_pixels(image, data)
    return load(image, data), notes


def _check_pixels(image: ImageFile.ImageFile, data: bytes) -> tuple[str, ...]:
    """Check for damage as strictly as possible; return notes on the check."""
    match KEPT.get(image.format or ""):
        case "png":
            check_png(data)
        case "webp":
            check_webp(data)
        case "jpeg":
            check_scans(data, image.width * image.height)
            if check_jpeg(data, image.size):
                return ()
    load(image, data)
    return ("JPEG checked by Pillow alone",) if image.format in ("JPEG", "MPO") else ()


def read_pixels(data: bytes, extension: str, *, max_pixels: int = MAX_READ_PIXELS) -> NDArray[Any]:
    """Return the values of an image, rotated upright, of shape (height, width, channels).

    Pictures have 1 channel (grey) or 3 (RGB) in uint8, or uint16 for 16-bit grey; transparency is
    on white. Arrays are returned as stored.

    Raises:
        RejectedImageError: the image cannot be decoded, or is a picture of more than `max_pixels`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = read_array(data) if extension == "npy" else _read_picture(data, max_pixels)
        except (RejectedImageError, MemoryError):
            raise
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RejectedImageError(f"it cannot be decoded: {reason}") from None
    return values[..., None] if values.ndim == 2 else values


def _read_picture(data: bytes, max_pixels: int) -> NDArray[Any]:
    with open_picture(data, tuple(KEPT)) as opened:
        _check_size(opened.width, opened.height, max_pixels)
        image = turn_upright(load(opened, data))
    if image.mode in _WIDE_MODES:
        return np.asarray(image).astype(np.uint16)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return np.asarray(Image.alpha_composite(white, seen).convert("RGB"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
