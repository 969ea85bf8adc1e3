"""Damage that Pillow's decoders ignore, found by checksums, lengths and a stricter decoder.

JPEG has no checksums: libjpeg reports invalid codes and missing or extra data, but a flipped bit
may still give another valid picture. PNG has a checksum per chunk, WebP has a length.
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
"""Prefixes of libjpeg warnings that mean wrong pixels; others concern odd headers."""
_COLOURS = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}
_MAX_WORK = 20 * 89_478_485
"""Maximum of pixels x scans of a JPEG: 20 scans (a dozen is usual) of the largest default image."""
_PNG_START = b"\x89PNG\r\n\x1a\n"


class DamageError(ValueError):
    """The pixels of an image are damaged; the message describes the damage."""


def check_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Decode a JPEG strictly, in grey and at an eighth of its size, which reads all of the data.

    Args:
        data: the file.
        size: (width, height) that was checked before; any other size is not decoded.

    Returns:
        Whether it was decoded; if not, only Pillow can check it, which ignores some damage.

    Raises:
        DamageError: libjpeg reports damaged pixels.
    """
    return _decode(data, size, "GRAY", min_factor=8) is not None


def decode_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Decode a JPEG strictly.

    Args:
        data: the file.
        size: (width, height) that was checked before; any other size is not decoded.

    Returns:
        Pixels of shape (height, width, channels): 1 channel (grey), 3 (RGB) or 4 (inverted CMYK).
        None if only Pillow can decode it, which ignores some damage.

    Raises:
        DamageError: libjpeg reports damaged pixels.
    """
    return _decode(data, size, "RGB", min_factor=1)


def _decode(
    data: bytes, size: tuple[int, int], colours: str, *, min_factor: int
) -> NDArray[np.uint8] | None:
    if simplejpeg is None:
        return None
    # The library has no size limit and allocates whatever size it reads itself: compare first.
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
            raise DamageError(f"it cannot be decoded completely: {reason}") from None
        return None
    return pixels


def check_scans(data: bytes, pixels: int) -> None:
    """Check that a JPEG does not have so many scans that decoding it would take minutes.

    Raises:
        DamageError: it has too many.
    """
    scans = data.count(b"\xff\xda")
    if scans * pixels > _MAX_WORK:
        raise DamageError(f"it has {scans:,} scans of {pixels:,} pixels, far more than is usual")


def check_png(data: bytes) -> None:
    """Verify the checksum of every chunk of a PNG.

    Raises:
        DamageError: a checksum differs, or the last chunk is missing.
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
    raise DamageError("it is truncated: its last chunk is missing")


def check_webp(data: bytes) -> None:
    """Check that a WebP is as long as its header says.

    Raises:
        DamageError: it is shorter.
    """
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data):
        raise DamageError(f"it is truncated: {len(data):,} bytes of {length + 8:,}")
