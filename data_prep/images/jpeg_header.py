"""Size of a JPEG from its header: what Pillow finds too, where its header is a plain one.

Pillow takes 15 times as long to open a file, which for images of a few kB is most of the work.
"""

from collections.abc import Iterator

_START = b"\xff\xd8\xff"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SKIPPED = (0xC4, 0xDD, 0xFE)  # Huffman tables, restart interval, comment
_SCAN = 0xDA
_TABLE_BYTES = 65


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a grey or colour JPEG of a plain header; None where Pillow decides.

    Plain is a header of segments without gaps that Pillow cannot trip over: one frame of 8 bits,
    whole tables, and of metadata JFIF, ICC profile, Adobe's mark and comments.
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
    """Yield kind, first byte and end of every segment that follows the last without a gap."""
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
