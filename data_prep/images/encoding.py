"""Re-encoding of pictures: if shards cannot hold their format, or if the options ask for it."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from data_prep.images.decoding import to_mode, to_srgb
from data_prep.images.settings import Encoding

_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_PLAIN = {"RGBa": "RGBA", "PA": "RGBA", "La": "LA", "I;16B": "I;16", "I;16L": "I;16"}
_FULL_COLOUR_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class ReencodedImage:
    """A re-encoded picture."""

    data: bytes
    """The file."""
    extension: str
    """jpg, png or webp."""
    width: int
    """Columns."""
    height: int
    """Rows."""
    notes: tuple[str, ...]
    """Changes other than format and size, as short phrases."""


def encode(
    image: Image.Image,
    target: str,
    encoding: Encoding,
    *,
    lossless: bool = False,
    white: int = 65_535,
) -> ReencodedImage:
    """Encode a loaded, upright picture in the target format and size.

    EXIF is dropped; the ICC profile is kept if the values stay in its colour space.

    Args:
        image: picture of any Pillow mode.
        target: jpeg, png or webp.
        encoding: size and quality.
        lossless: whether to encode WebP losslessly.
        white: value of white in a grey picture of more than 8 bits, by which it is scaled to 8.

    Raises:
        OSError, ValueError: the format cannot hold a picture of this size.
    """
    profile = image.info.get("icc_profile")
    notes: list[str] = []
    plain, profile = _to_plain(image, profile, notes)
    resized = _resize(plain, encoding.target_size(*plain.size))
    if target != "png":
        resized = _to_8_bits(resized, white, alpha=target == "webp", notes=notes)
    return ReencodedImage(
        data=_save(resized, target, encoding.quality, profile, lossless),
        extension=_EXTENSIONS[target],
        width=resized.width,
        height=resized.height,
        notes=tuple(notes),
    )


def _to_plain(
    image: Image.Image, profile: bytes | None, notes: list[str]
) -> tuple[Image.Image, bytes | None]:
    """Return the picture in a mode that PNG supports, and the profile of its values."""
    if image.mode in _PNG_MODES:
        return image, profile
    if image.mode in _PLAIN:
        return image.convert(_PLAIN[image.mode]), profile
    notes.append(f"{image.mode} converted to RGB")
    if image.mode in ("CMYK", "LAB"):
        return to_srgb(image), None
    return image.convert("RGB"), profile


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.has_transparency_data and image.mode in ("L", "RGB"):  # one colour is transparent
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    return image.resize(size, Image.Resampling.LANCZOS)


def round_to_8_bits(values: NDArray[np.uint16], white: int) -> NDArray[np.uint8]:
    """Return values from 0 to `white` as 0 to 255."""
    scaled = (values.astype(np.uint32) * 510 + white) // (2 * white)
    return np.minimum(scaled, 255).astype(np.uint8)  # resizing may overshoot white


def _to_8_bits(image: Image.Image, white: int, *, alpha: bool, notes: list[str]) -> Image.Image:
    """Return the picture in mode L or RGB, or in RGBA if it has transparency and `alpha` is set."""
    if image.mode == "I;16":
        notes.append(f"{white.bit_length()} bits rounded to 8")
        return Image.fromarray(round_to_8_bits(np.asarray(image), white))
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        if alpha:
            return seen
        notes.append("transparency laid on white")
        return to_mode(seen, "RGB")
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _save(
    image: Image.Image, target: str, quality: int, profile: bytes | None, lossless: bool
) -> bytes:
    buffer = io.BytesIO()
    if target == "png":
        image.save(buffer, format="PNG", icc_profile=profile)
    elif target == "webp":
        image.save(buffer, format="WEBP", quality=quality, lossless=lossless, icc_profile=profile)
    else:
        subsampling = "4:4:4" if quality >= _FULL_COLOUR_QUALITY else "4:2:0"
        with _room_for(image):
            image.save(
                buffer,
                format="JPEG",
                quality=quality,
                subsampling=subsampling,
                optimize=True,
                icc_profile=profile,
            )
    return buffer.getvalue()


@contextmanager
def _room_for(image: Image.Image) -> Iterator[None]:
    """Enlarge Pillow's buffer, which must hold the whole of an optimised JPEG."""
    before = ImageFile.MAXBLOCK
    ImageFile.MAXBLOCK = max(before, 8 * image.width * image.height + 2**20)
    try:
        yield
    finally:
        ImageFile.MAXBLOCK = before
