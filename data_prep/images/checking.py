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
    check_shape,
    count_nan,
    is_channels_first,
    read_array,
    read_header,
    read_values,
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
from data_prep.images.decoding import (
    DecodingError,
    Loaded,
    check_depth,
    check_size,
    decode,
    load_tiff,
    reason_of,
    wide_values,
)
from data_prep.images.deep_png import read_deep_png
from data_prep.images.encoding import encode, round_to_8_bits
from data_prep.images.headers import grey_white, plain_jpeg_size
from data_prep.images.jpeg2000 import DepthError, read_8_bits
from data_prep.images.opening import KEPT, UnknownFormatError, load, open_picture
from data_prep.images.orientation import orientation_of, turn_array, turn_upright
from data_prep.images.settings import MAX_PIXELS, MAX_READ_PIXELS, Encoding
from data_prep.images.tiff import check_layout
from data_prep.images.tiff_layout import STARTS, TiffError, read_layout

KEEP = Encoding()
"""Encoding that keeps the bytes of every format that shards can hold."""
RE_ENCODED = "written anew"
"""Note on a picture whose bytes were not kept, as sets on disk have it."""
FIRST_PAGE = "first of several pages"
"""Note on a TIFF of which later pages are left out."""
FIRST_FRAME = "first of several frames"
"""Note on an animation of a format that shards cannot hold."""
PREMULTIPLIED = "premultiplied alpha divided out"
"""Note on a TIFF of which the colours were multiplied by alpha."""
MOVED = "channels moved to the last axis"
"""Note on an array whose channels came first."""
UNSURE = "channels taken from the last axis, which is not the shortest"
"""Note on an array whose channels may be on another axis."""
MISSING = "NaN values"
"""Note on an array with missing measurements."""

_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_LOSSLESS_WEBP = b"VP8L"


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
    channel_axis: str = "last",
) -> CheckedImage:
    """Check that an image can be used, and re-encode it if the options or its format require it.

    The format is detected from the bytes, whatever the file name. Only the first frame of an
    animation or page of a document is used. Arrays are never resized.

    Args:
        data: an image file.
        max_pixels: maximum number of pixels; a larger image is rejected before it is decoded.
        decode: whether to decode the whole image, or to read its header only.
        encoding: size and format of stored pictures.
        channel_axis: axis of the channels of arrays: last, first, or auto, which recognises few
            channels before rows and columns. First ones are moved to the last axis.

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
                return _check_array(data, max_pixels, decode, channel_axis)
            return _check_picture(data, max_pixels, decode, encoding)
    except (RejectedImageError, MemoryError):
        raise
    except (
        ArrayError,
        DamageError,
        DecodingError,
        DepthError,
        TiffError,
        UnknownFormatError,
    ) as error:
        raise RejectedImageError(str(error)) from None
    # Pillow's readers raise nearly any type when the bytes are hostile.
    except Exception as error:
        raise RejectedImageError(f"it cannot be decoded: {reason_of(error)}") from None


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


def _check_array(data: bytes, max_pixels: int, decode: bool, channel_axis: str) -> CheckedImage:
    header = read_header(data, channels_last=channel_axis == "last")
    notes: tuple[str, ...] = ()
    is_first = channel_axis == "auto" and is_channels_first(header.shape)
    if len(header.shape) == 3 and (is_first or channel_axis == "first"):
        channels, height, width = header.shape
        check_size(width, height, max_pixels)
        check_shape((height, width, channels))
        data = write_array(np.moveaxis(read_values(data, header), 0, -1))
        header = read_header(data)
        notes = (MOVED,)
    height, width = header.shape[:2]
    check_size(width, height, max_pixels)
    check_shape(header.shape)
    if (
        channel_axis == "auto"
        and len(header.shape) == 3
        and header.shape[2] > min(header.shape[:2])
    ):
        notes = (*notes, UNSURE)
    if header.stored_type != header.dtype.newbyteorder("="):
        notes = (*notes, f"{header.dtype.name} converted to {header.stored_type}")
    if (decode or not header.is_plain) and count_nan(read_values(data, header)):
        notes = (*notes, MISSING)
    return CheckedImage(
        data=_plain_array(data, header), extension="npy", width=width, height=height, notes=notes
    )


def _plain_array(data: bytes, header: ArrayHeader) -> bytes:
    return data if header.is_plain else write_array(read_array(data))


def _check_picture(data: bytes, max_pixels: int, decode: bool, encoding: Encoding) -> CheckedImage:
    if data.startswith(STARTS):
        return _check_tiff(data, max_pixels, encoding)
    with open_picture(data) as image:
        check_size(image.width, image.height, max_pixels)
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


def _check_tiff(data: bytes, max_pixels: int, encoding: Encoding) -> CheckedImage:
    layout = read_layout(data)
    check_size(layout.width, layout.height, max_pixels)
    check_layout(layout, max_pixels)
    loaded = load_tiff(data, layout)
    notes = (FIRST_PAGE,) if layout.has_more_pages else ()
    if layout.is_premultiplied and isinstance(loaded, Image.Image):
        notes = (*notes, PREMULTIPLIED)
    accepts_8_bits = layout.colours == "RGB" and encoding.format in ("jpeg", "webp")
    if isinstance(loaded, np.ndarray) and loaded.dtype == np.uint16 and accepts_8_bits:
        bits = layout.bits[0]
        # Of 16 bits the upper 8, as in the sets that exist.
        reduced = loaded >> 8 if bits == 16 else round_to_8_bits(loaded, 2**bits - 1)
        loaded = Image.fromarray(reduced.astype(np.uint8))
        notes = (*notes, f"{bits} bits {'cut' if bits == 16 else 'rounded'} to 8")
    target = encoding.target_format(None)
    white = 2 ** min(16, layout.bits[0]) - 1
    return _store(loaded, target, encoding, notes, profile=layout.profile, white=white)


def _re_encode(
    image: ImageFile.ImageFile, data: bytes, target: str, encoding: Encoding
) -> CheckedImage:
    bits = check_depth(image, data, accept_8_bits=target != "png")
    notes: tuple[str, ...] = (f"{bits} bits cut to 8",) if bits else ()
    if image.format not in KEPT and getattr(image, "is_animated", False):
        notes = (*notes, FIRST_FRAME)
    loaded, found = _load(image, data, bits)
    return _store(
        loaded,
        target,
        encoding,
        (*found, *notes),
        profile=image.info.get("icc_profile"),
        lossless=_LOSSLESS_WEBP in data,
        white=grey_white(data),
    )


def _store(
    loaded: Loaded,
    target: str,
    encoding: Encoding,
    notes: tuple[str, ...],
    *,
    profile: bytes | None,
    lossless: bool = False,
    white: int,
) -> CheckedImage:
    """Encode a decoded picture; values that no picture format holds become an array."""
    if isinstance(loaded, Image.Image) or (loaded.dtype == np.uint16 and loaded.ndim == 2):
        image = loaded if isinstance(loaded, Image.Image) else Image.fromarray(loaded)
        if profile:
            image.info["icc_profile"] = profile
        encoded = encode(image, target, encoding, lossless=lossless, white=white)
        return CheckedImage(
            data=encoded.data,
            extension=encoded.extension,
            width=encoded.width,
            height=encoded.height,
            notes=(*notes, *encoded.notes, RE_ENCODED),
        )
    missing = (MISSING,) if count_nan(loaded) else ()
    return CheckedImage(
        data=write_array(loaded),
        extension="npy",
        width=loaded.shape[1],
        height=loaded.shape[0],
        notes=(*notes, *missing, "stored as an array", RE_ENCODED),
    )


def _load(image: ImageFile.ImageFile, data: bytes, cut_bits: int) -> tuple[Loaded, tuple[str, ...]]:
    """Decode every pixel as strictly as possible, upright; return the picture and notes on it."""
    if cut_bits and image.format == "JPEG2000":
        return read_8_bits(data), ()
    if cut_bits and image.format == "PNG" and "transparency" in image.info:
        check_png(data)
        upper = (read_deep_png(data) >> 8).astype(np.uint8)
        return Image.fromarray(turn_array(upper, orientation_of(image))), ()
    if KEPT.get(image.format or "") == "jpeg" and image.mode in ("L", "RGB"):
        check_scans(data, image.width * image.height)
        pixels = decode_jpeg(data, image.size)
        if pixels is not None:
            loaded = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            if loaded.mode == image.mode:
                kept = ("exif", "icc_profile", "xmp")
                loaded.info = {name: image.info[name] for name in kept if name in image.info}
                return turn_upright(loaded), ()
    notes = _check_pixels(image, data)
    return wide_values(turn_upright(load(image, data)), data), notes


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
    """Return the values of a stored image, as `decode` does, with the channels that it has.

    Raises:
        RejectedImageError: the image cannot be decoded, or has more than `max_pixels`.
    """
    try:
        return decode(data, extension, max_pixels=max_pixels).pixels
    except DecodingError as error:
        raise RejectedImageError(str(error)) from None
