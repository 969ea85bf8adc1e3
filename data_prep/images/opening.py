"""Opening picture files in Pillow: which formats, which limits, and metadata that is in the way."""

import ctypes
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import PIL
from PIL import Image, ImageFile

from data_prep.images.foreign_formats import name_format
from data_prep.images.jpeg2000 import has_alpha

KEPT = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
"""Pillow's name of each format that shards can hold → format."""
FORMATS = (*KEPT, "AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "TIFF")
"""Pillow's names of all supported formats, in the order in which they are tried."""
PNG_START = b"\x89PNG\r\n\x1a\n"
"""First bytes of every PNG."""

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
_TGA_DESCRIPTOR, _TGA_ALPHA_BITS = 17, 0x0F
_MAX_PROFILE = 2**24
_NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
"""What Pillow's readers raise on files of another format, as in `Image.open`."""


class UnknownFormatError(ValueError):
    """The data is not an image of a supported format."""


def open_picture(data: bytes, formats: tuple[str, ...] = FORMATS) -> ImageFile.ImageFile:
    """Open a picture without decoding it; its format is detected from the bytes.

    Unlike `Image.open` it has no limit on the size: compare that before pixels are loaded. Text and
    colour profiles of a PNG, of whatever length, never keep it from being opened.

    Raises:
        UnknownFormatError: no reader accepts the data.
        Exception: nearly any type, on hostile bytes.
    """
    try:
        return _open(data, formats)
    except Exception as error:
        plain = _without_metadata(data)
        if plain is None:
            raise
        try:
            image = _open(plain, formats)
        except Exception:
            raise error from None
        profile = _png_profile(data)
        if profile:
            image.info["icc_profile"] = profile
        return image


def has_transparency(image: Image.Image, data: bytes) -> bool:
    """Return whether an opened picture has transparency by the rules of its format.

    Pillow takes the last of two or four components for it in a JPEG 2000, and the bits that are
    left over in a TGA, which may be all zero.
    """
    match image.format:
        case "JPEG2000":
            return image.has_transparency_data and has_alpha(data)
        case "TGA":
            return image.has_transparency_data and bool(data[_TGA_DESCRIPTOR] & _TGA_ALPHA_BITS)
    return image.has_transparency_data


def load(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Decode the pixels of an opened picture.

    Args:
        image: the opened picture.
        data: its file.

    Returns:
        The picture, or another one of the same file if metadata behind the pixels was in the way.

    Raises:
        Exception: nearly any type, on hostile bytes.
    """
    try:
        with _without_limit():
            image.load()
    except Exception:
        plain = _without_metadata(data)
        if plain is None:
            raise
        again = _open(plain, FORMATS)
        with _without_limit():
            again.load()
        again.info |= {name: image.info[name] for name in ("icc_profile",) if name in image.info}
        image = again
    if image.mode == "P" and image.palette is None:
        raise ValueError("its palette is missing")
    if image.format == "TGA" and image.mode == "RGBA" and not has_transparency(image, data):
        return image.convert("RGB")
    return image


def _open(data: bytes, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    Image.init()
    prefix = data[:16]
    for name in formats:
        if name not in Image.OPEN:
            continue  # this build of Pillow lacks it
        factory, accept = Image.OPEN[name]
        try:
            if accept is None or accept(prefix) is True:
                with _without_limit():
                    image = factory(io.BytesIO(data), "")
                if name == "PNG":
                    _scale_grey_key(image, data)
                return image
        except _NOT_THIS_FORMAT:
            continue
    foreign = name_format(data)
    if foreign is None:
        raise UnknownFormatError("it is not an image of a supported format")
    raise UnknownFormatError(
        f"it is {foreign}, which is not supported: convert it to PNG, or to an array (.npy)"
    )


@cache
def silence_libtiff() -> None:
    """Keep libtiff from writing to the terminal; Pillow raises, and leaves the messages to it.

    Pillow has no setting for it. Its wheels bring libtiff along, elsewhere nothing changes.
    """
    package = Path(PIL.__file__).parent
    places = (package.parent / "pillow.libs", package / ".dylibs")
    for library in (path for place in places for path in place.glob("libtiff*")):
        with suppress(OSError, AttributeError):
            set_handler = ctypes.CDLL(str(library)).TIFFSetErrorHandler
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


def _scale_grey_key(image: ImageFile.ImageFile, data: bytes) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits to 8, as Pillow does with its pixels."""
    bits, colour_type, key = data[24], data[25], image.info.get("transparency")
    if colour_type == 0 and bits in (2, 4) and isinstance(key, int):
        white = 2**bits - 1
        image.info["transparency"] = (key & white) * 255 // white


@contextmanager
def _without_limit() -> Iterator[None]:
    """Lift the size limit that some of Pillow's readers take from a global variable."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of every complete chunk, checksum included."""
    place = len(PNG_START)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        stop = place + 12 + length
        if stop > len(data):
            break
        yield kind, place, stop
        place = stop


def _without_metadata(data: bytes) -> bytes | None:
    """Return a PNG without the chunks that pixels do not depend on; None if it is no PNG."""
    if not data.startswith(PNG_START):
        return None
    kept = [data[start:stop] for kind, start, stop in png_chunks(data) if kind in _PIXEL_CHUNKS]
    return PNG_START + b"".join(kept)


def _png_profile(data: bytes) -> bytes | None:
    for kind, start, stop in png_chunks(data):
        if kind == b"iCCP":
            _, _, packed = data[start + 8 : stop - 4].partition(b"\0")
            reader = zlib.decompressobj()
            try:
                profile = reader.decompress(packed[1:], _MAX_PROFILE)
            except zlib.error:
                return None
            return profile if reader.eof else None
    return None
