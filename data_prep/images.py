"""Images looked at before they are kept: format, size, and whether they decode."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Largest image taken unless told otherwise, in pixels; Pillow warns of larger ones."""

_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_REWRITTEN = ("AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "TIFF")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class RejectedImageError(ValueError):
    """An image that must not be kept; the text says why."""


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    """An image that may be kept."""

    data: bytes
    """The file as it is to be stored."""
    extension: str
    """Extension that fits the data: jpg, png or webp."""
    width: int
    """Columns as stored, before any EXIF orientation."""
    height: int
    """Rows as stored, before any EXIF orientation."""


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS, decode: bool = True) -> CheckedImage:
    """Check that an image can be used, and rewrite as PNG what is not JPEG, PNG or WebP.

    The format is told from the bytes, whatever the file was called. Of an animation the first
    frame is kept. Rewriting loses nothing: what PNG cannot hold is rejected.

    Args:
        data: an image file.
        max_pixels: most pixels an image may have; a larger one is rejected before it is decoded.
        decode: whether to decode the whole image rather than its header alone.

    Raises:
        RejectedImageError: the data is no image, is cut or damaged, or is too large.
    """
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, which does not concern the pixels.
        warnings.simplefilter("ignore")
        try:
            return _check(data, max_pixels, decode)
        except (RejectedImageError, MemoryError):
            raise
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RejectedImageError(f"it does not decode: {reason}") from None


def _check(data: bytes, max_pixels: int, decode: bool) -> CheckedImage:
    Image.init()
    formats = [name for name in (*_KEPT, *_REWRITTEN) if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise RejectedImageError("it is not an image of a known format") from None
    with image:
        if image.width * image.height > max_pixels:
            size = f"{image.width}x{image.height}"
            raise RejectedImageError(f"it has {size} pixels, more than --max-pixels {max_pixels:,}")
        if image.format not in _KEPT:
            return _rewrite(image)
        if decode:
            image.load()
        extension = _KEPT[image.format]
        return CheckedImage(data=data, extension=extension, width=image.width, height=image.height)


def _rewrite(image: Image.Image) -> CheckedImage:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I":
        low, high = upright.getextrema()
        if isinstance(low, (int, float)) and low >= 0 and int(high) < 2**16:  # type: ignore[arg-type]
            upright = upright.convert("I;16")
    if upright.mode not in _PNG_MODES:
        raise RejectedImageError(
            f"PNG cannot hold {image.format} pixels of mode {image.mode}: convert it yourself"
        )
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG")
    return CheckedImage(
        data=buffer.getvalue(), extension="png", width=upright.width, height=upright.height
    )
