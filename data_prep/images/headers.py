"""File headers: the size of plain JPEGs, and the bit depth that Pillow truncates to 8.

Opening a JPEG with Pillow takes 15 times as long as reading a plain header here, and for images of
a few kB that would be most of the work. `simplejpeg.decode_jpeg_header` is faster still (1.5 µs
against 5.6), but accepts files that Pillow cannot open: 12-bit frames, an Adobe segment that is too
short, stray markers between segments.
"""

from collections.abc import Iterator

from PIL import Image

from data_prep.images.deep_png import is_deep_png
from data_prep.images.jpeg2000 import bit_depth, is_jpeg2000

_START = b"\xff\xd8\xff"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SKIPPED = (0xC4, 0xDD, 0xFE)  # Huffman tables, restart interval, comment
_SCAN = 0xDA
_TABLE_BYTES = 65
_AV1_SETTINGS = b"av1C"


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a grey or colour JPEG with a plain header, otherwise None.

    A plain header has no gaps between segments and nothing that could make Pillow fail: one 8-bit
    frame, complete tables, and no metadata but JFIF, ICC profile, Adobe marker and comments. Pillow
    finds the same size, so it need not be asked.
    """
    size = None
    for kind, first, stop in _segments(data):
        if kind == _SCAN:
            return size
        if kind in _FRAMES and size is None:
            size = _frame_size(data, first, stop)
            is_plain = size is not None
        else:
            is_plain = kind in _SKIPPED or _is_plain(data, kind, first, stop)
        if not is_plain:
            break
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, first byte, end) of every segment that follows the last without a gap."""
    place = 2 if data.startswith(_START) else len(data)
    while place <= len(data) - 4 and data[place] == 0xFF:
        kind, first = data[place + 1], place + 4
        place += 2 + (data[place + 2] << 8 | data[place + 3])
        if not first <= place <= len(data):
            break
        yield kind, first, place


def _frame_size(data: bytes, first: int, stop: int) -> tuple[int, int] | None:
    length = stop - first
    if length < 6 or data[first] != 8 or data[first + 5] not in (1, 3):
        return None
    height = data[first + 1] << 8 | data[first + 2]
    width = data[first + 3] << 8 | data[first + 4]
    if length != 6 + 3 * data[first + 5] or not height or not width:
        return None
    return width, height


def _is_plain(data: bytes, kind: int, first: int, stop: int) -> bool:
    length = stop - first
    match kind:
        case 0xDB:  # quantization
            tables = range(first, stop, _TABLE_BYTES)
            return length % _TABLE_BYTES == 0 and all(data[table] < 16 for table in tables)
        case 0xE0:  # JFIF
            return length >= 14 and data.startswith(b"JFIF\0", first)
        case 0xE2:  # colour profile
            return length > 14 and data.startswith(b"ICC_PROFILE\0", first)
        case 0xEE:  # which colours
            return length >= 12 and data.startswith(b"Adobe", first)
    return False


def truncated_bit_depth(image: Image.Image, data: bytes) -> int:
    """Return the bits per channel of a file whose values Pillow truncates to 8 bits, else 0.

    Args:
        image: the opened file; its pixels are not loaded.
        data: the file.
    """
    match image.format:
        case "PNG":
            bits = 16 if is_deep_png(data) else 8  # other grey of 16 bits is read as it is
        case "PPM":
            bits = _ppm_bits(data) if image.mode == "RGB" else 8
        case "JPEG2000":
            bits = bit_depth(data)
            bits = 8 if image.mode.startswith("I") and bits <= 16 else bits
        case "AVIF":
            place = data.find(_AV1_SETTINGS)
            bits = 10 if place >= 0 and (data[place + 6 : place + 7] or b"\0")[0] & 0x40 else 8
        case _:
            bits = 8
    return bits if bits > 8 else 0


def jpeg2000_shift(data: bytes) -> int:
    """Return by how many bits Pillow shifts grey of 9 to 15 bits to 16; 0 for other formats."""
    return max(0, 16 - max(8, bit_depth(data))) if is_jpeg2000(data) else 0


def grey_maximum(data: bytes) -> int | None:
    """Return the value that stands for white in a PGM, which Pillow scales to 65,535; else None."""
    return _ppm_maximum(data) if data.startswith((b"P2", b"P5")) else None


def grey_white(data: bytes) -> int:
    """Return the value of white in a grey picture of more than 8 bits that is not a TIFF."""
    if is_jpeg2000(data):
        return int(2 ** bit_depth(data)) - 1
    return grey_maximum(data) or 65_535


def _ppm_bits(data: bytes) -> int:
    return (_ppm_maximum(data) or 255).bit_length()


def _ppm_maximum(data: bytes) -> int | None:
    lines = (line.partition(b"#")[0] for line in data[:4096].split(b"\n"))
    words = b" ".join(lines).split(maxsplit=4)
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else None
