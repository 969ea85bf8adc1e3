"""Damage that Pillow's decoders pass over: found by checksums, lengths and a stricter decoder.

JPEG has no checksums: what libjpeg notices is damage (a code that does not exist, data that is left
over or missing), and a flipped bit may still give another picture of the same form. PNG has a
checksum for each chunk. WebP has a length.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None

_DAMAGE = ("Corrupt JPEG data", "Premature end", "Inconsistent progression")
"""How libjpeg's warnings begin that mean wrong pixels; others mean odd headers."""
_COLOURS = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}
_MAX_WORK = 20 * 89_478_485
"""Most pixels times scans of a JPEG: 20 scans, of a dozen in use, over the largest by default."""
_PNG_START = b"\x89PNG\r\n\x1a\n"


class DamageError(ValueError):
    """The pixels of an image are damaged; the text says how that shows."""


def check_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Decode a JPEG strictly, at an eighth of its size and in grey, which reads all of it.

    Args:
        data: the file, whose header has been read.
        size: (width, height) by its header, which is held to.

    Returns:
        Whether that could be done; else it is left to Pillow, which passes over damage.

    Raises:
        DamageError: libjpeg says that pixels are damaged.
    """
    return _decode(data, size, "GRAY", min_factor=8) is not None


def decode_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Decode a JPEG strictly; None where that is left to Pillow, which passes over damage.

    Args:
        data: the file, whose header has been read.
        size: (width, height) by its header, which is held to.

    Returns:
        (height, width, channels): 1 channel of grey, 3 of RGB, or 4 of inverted CMYK.

    Raises:
        DamageError: libjpeg says that pixels are damaged.
    """
    return _decode(data, size, "RGB", min_factor=1)


def _decode(
    data: bytes, size: tuple[int, int], colours: str, *, min_factor: int
) -> NDArray[np.uint8] | None:
    if simplejpeg is None:
        return None
    # The library has no limit of its own, and what it allocates is what its own reading says.
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != size:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, _COLOURS.get(stored, colours), min_factor=min_factor
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        if reason.startswith(_DAMAGE):
            raise DamageError(f"it does not decode whole: {reason}") from None
        return None
    return pixels


def check_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG of so many passes over its pixels that decoding it would take minutes.

    Raises:
        DamageError: it has.
    """
    scans = data.count(b"\xff\xda")
    if scans * pixels > _MAX_WORK:
        raise DamageError(f"it has {scans:,} scans over {pixels:,} pixels, which no camera makes")


def check_png(data: bytes) -> None:
    """Compare the checksum of every chunk of a PNG, down to its end.

    Raises:
        DamageError: one differs, or the end is missing.
    """
    view, place = memoryview(data), len(_PNG_START)
    while len(view) - place >= 12:
        length, kind = struct.unpack_from(">I4s", view, place)
        stop = place + 8 + length
        if stop + 4 > len(view):
            break
        if zlib.crc32(view[place + 4 : stop]) != struct.unpack_from(">I", view, stop)[0]:
            name = kind.decode("ascii", "backslashreplace")
            raise DamageError(f"the checksum of its chunk {name} differs")
        if kind == b"IEND":
            return
        place = stop + 4
    raise DamageError("it is cut: its last chunk is missing")


def check_webp(data: bytes) -> None:
    """Compare the length of a WebP with what its header says.

    Raises:
        DamageError: it is shorter.
    """
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data):
        raise DamageError(f"it is cut: {len(data):,} bytes of {length + 8:,}")
