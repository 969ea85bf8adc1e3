"""Damage that Pillow's decoders ignore, found by checksums, lengths and a stricter decoder.

JPEG has no checksums: libjpeg reports invalid codes and missing or extra data, but a flipped bit
may still give another valid picture. PNG has a checksum per chunk, WebP has a length.
"""

import re
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from data_prep.images.opening import PNG_START
from data_prep.images.settings import MAX_PIXELS

try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None

DAMAGE = ("Corrupt JPEG data", "Premature end", "Inconsistent progression")
"""Prefixes of libjpeg warnings that mean wrong pixels; others concern odd headers."""
_COLOURS = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}
_USUAL_SCANS = 20
"""Scans that a JPEG of any size may have; a dozen is usual."""
_MAX_WORK = _USUAL_SCANS * MAX_PIXELS
"""Maximum of pixels x scans of a JPEG up to the default size."""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""A JPEG marker that has a length, or ends the image; not stuffed zeros, restarts, fill bytes."""
_SCAN, _END = 0xDA, 0xD9


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


def read_jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Return width, height and colour space of a JPEG; None if only Pillow can read it."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return width, height, colours


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
        if reason.startswith(DAMAGE):
            raise DamageError(f"it cannot be decoded completely: {reason}") from None
        return None
    return pixels


def check_scans(data: bytes, pixels: int) -> None:
    """Check that a JPEG does not have so many scans that decoding it would take minutes.

    Args:
        data: the file; a video or another image may follow the first.
        pixels: width x height of the first image.

    Raises:
        DamageError: it has too many.
    """
    limit = max(_MAX_WORK, _USUAL_SCANS * pixels)
    if data.count(b"\xff\xda") * pixels <= limit:
        return
    scans = _count_scans(data)
    if scans * pixels > limit:
        raise DamageError(f"it has {scans:,} scans of {pixels:,} pixels, far more than is usual")


def _count_scans(data: bytes) -> int:
    """Count the scans of the first image; thumbnails and whatever follows its end do not count."""
    scans, place = 0, 2
    while (found := _MARKER.search(data, place)) and data[found.start() + 1] != _END:
        place = found.end()
        scans += data[place - 1] == _SCAN
        place += int.from_bytes(data[place : place + 2], "big")
    return scans


def check_png(data: bytes) -> None:
    """Verify the checksum of every chunk of a PNG.

    Raises:
        DamageError: a checksum differs, or the last chunk is missing.
    """
    view, place = memoryview(data), len(PNG_START)
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
