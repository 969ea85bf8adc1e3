"""The layout of a TIFF: the tags of its first page, read before anything is decoded."""

import math
import re
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.images.arrays import MAX_CHANNELS

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of every TIFF and BigTIFF."""

_PROFILE, _SUBFILE, _OLD_SUBFILE, _DESCRIPTION, _COLORMAP, _INK_SET = 34675, 254, 255, 270, 320, 332
_GDAL_METADATA, _GDAL_NO_DATA = 42112, 42113
_PLACES = {False: (273, 279), True: (324, 325)}
"""Tags of offsets and lengths of strips (False) or tiles (True)."""
_TAGS = {
    *(_SUBFILE, _OLD_SUBFILE, _DESCRIPTION, _COLORMAP, _INK_SET),
    *(256, 257, 258, 259, 262, 266, 274, 277, 284, 317, 322, 323, 338, 339, 32997),
    *(278, *_PLACES[False], *_PLACES[True], _PROFILE, _GDAL_METADATA, _GDAL_NO_DATA),
}
_BYTES = (_PROFILE, _DESCRIPTION, _GDAL_METADATA, _GDAL_NO_DATA)
_LONG = (*_PLACES[False], *_PLACES[True])
_CMYK_INKS, _OLD_REDUCED = 1, 2
_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 16: "Q", 17: "q"}
"""TIFF's type number → the character of `struct`; fractions are of no concern here."""


class Photometric(IntEnum):
    """Meaning of the bands, as far as it is read."""

    WHITE_IS_ZERO = 0
    BLACK_IS_ZERO = 1
    RGB = 2
    PALETTE = 3
    CMYK = 5
    YCBCR = 6
    LAB = 8


class SampleFormat(IntEnum):
    """Kind of the values."""

    UNSIGNED = 1
    SIGNED = 2
    FLOAT = 3
    UNDEFINED = 4


_PHOTOMETRIC = {
    Photometric.WHITE_IS_ZERO: "white-is-zero grey",
    Photometric.BLACK_IS_ZERO: "grey",
    Photometric.RGB: "RGB",
    Photometric.PALETTE: "palette",
    4: "mask",
    Photometric.CMYK: "CMYK",
    Photometric.YCBCR: "YCbCr",
    Photometric.LAB: "LAB",
    9: "ICCLAB",
    10: "ITULAB",
    32803: "camera raw (CFA)",
    32844: "LogL",
    32845: "LogLuv",
    34892: "camera raw (linear)",
}
_COMPRESSION = {
    1: "no",
    2: "CCITT",
    3: "CCITT G3",
    4: "CCITT G4",
    5: "LZW",
    6: "old JPEG",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    50000: "zstd",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
KINDS: dict[int, str] = {
    SampleFormat.UNSIGNED: "uint",
    SampleFormat.SIGNED: "int",
    SampleFormat.FLOAT: "float",
    SampleFormat.UNDEFINED: "uint",
}
PREVIEW = 1
"""Bit of NewSubfileType: a smaller copy of another page."""
_MASK = 4
_MAX_PAGES = 4096
_DAMAGE = (AttributeError, IndexError, OverflowError, TypeError, ValueError, struct.error)
_SHAPE = re.compile(r'"shape": \[([\d, ]{1,200})\]')
_IMAGES = re.compile(r"^images=(\d{1,9})\s*$", re.MULTILINE)


class TiffError(ValueError):
    """A TIFF cannot be read with the right values; the message names what it is."""


@dataclass(frozen=True, kw_only=True)
class TiffLayout:
    """How the first page of a TIFF stores its values."""

    start: bytes
    """First four bytes of the file."""
    width: int
    """Columns as stored."""
    height: int
    """Rows as stored."""
    samples: int
    """Bands, colours and alpha together."""
    bits: tuple[int, ...]
    """Bits per value of each band, or of all."""
    formats: tuple[int, ...]
    """SampleFormat of each band, or of all: 1 unsigned, 2 signed, 3 floating point, 4 undefined."""
    photometric: int
    """Meaning of the bands."""
    extra: tuple[int, ...]
    """ExtraSamples: 0 unspecified, 1 premultiplied alpha, 2 alpha."""
    compression: int
    """Compression scheme."""
    predictor: int
    """1 none, 2 differences, 3 differences of floating-point values."""
    planar: int
    """1 bands next to each other, 2 one plane per band."""
    fill_order: int
    """1 or 2, the order of bits in a byte."""
    orientation: int
    """As in EXIF."""
    tile: tuple[int, int] | None
    """Columns and rows of a tile; None for strips."""
    subfile: int
    """NewSubfileType; bit 0: a preview of another page."""
    depth: int
    """Slices of a volume in one page."""
    has_more_pages: bool
    """Whether other pages of full size follow."""
    profile: bytes | None
    """ICC profile."""
    inks: int
    """InkSet of separated bands: 1 CMYK, 2 other inks."""
    colormap: tuple[int, ...]
    """All red, all green and all blue values of the palette."""
    gdal_metadata: bytes = b""
    """XML of GDAL, with the descriptions of the bands among others."""
    gdal_no_data: bytes = b""
    """GDAL's no-data value, as text."""

    @property
    def no_data(self) -> float | None:
        """No-data value; None if the tags have none, or NaN."""
        try:
            value = float(self.gdal_no_data.rstrip(b"\0 "))
        except ValueError:
            return None
        return None if math.isnan(value) else value

    @property
    def alpha(self) -> int:
        """Number of bands that are transparency, 0 or 1."""
        return int(len(self.extra) == 1 and self.extra[0] == 2)

    @property
    def is_premultiplied(self) -> bool:
        """Whether it is RGB of 8 bits, multiplied by its alpha."""
        is_rgb = self.photometric == Photometric.RGB and self.samples == 4
        return is_rgb and self.extra == (1,) and set(self.bits) == {8}

    @property
    def palette(self) -> NDArray[np.uint8]:
        """Colours of the palette, (colours, 3), of 16 bits; or of 8 as in libtiff, if all fit."""
        colours = np.array(self.colormap, dtype=np.int64).reshape(3, -1).T
        shown: NDArray[np.uint8] = (colours >> (8 if self.is_deep_palette else 0)).astype(np.uint8)
        return shown

    @property
    def is_deep_palette(self) -> bool:
        """Whether the colours of the palette have 16 bits, as they should."""
        return max(self.colormap, default=256) > 255

    @property
    def colours(self) -> str:
        """Pillow's mode of a picture with these bands, by 8 bits; "" if there is none."""
        modes = {
            (0, 1): "L",
            (1, 1): "L",
            (2, 3): "RGB",
            (3, 1): "RGB",
            (6, 3): "RGB",
            (5, 4): "CMYK",
        }
        mode = modes.get((self.photometric, self.samples - len(self.extra)), "")
        if mode == "CMYK" and self.inks != _CMYK_INKS:
            return ""
        if not self.extra:
            return mode
        return f"{mode}A" if self.alpha and mode in ("L", "RGB") else ""

    @property
    def type(self) -> str:
        """Type of the values, such as uint16."""
        if len(set(self.bits)) > 1 or len(set(self.formats)) > 1:
            return "different types"
        return f"{KINDS.get(self.formats[0], 'complex')}{self.bits[0]}"

    def __str__(self) -> str:
        bands = f"{self.samples} bands" if self.samples > 1 else "1 band"
        colours = _PHOTOMETRIC.get(self.photometric, f"photometric {self.photometric}")
        packed = _COMPRESSION.get(self.compression, f"unknown ({self.compression})")
        predicted = f" and predictor {self.predictor}" if self.predictor > 1 else ""
        return f"a TIFF with {bands} of {self.type} ({colours}, {packed} compression{predicted})"


def read_layout(data: bytes) -> TiffLayout:
    """Read the tags of a TIFF's first page.

    Raises:
        TiffError: there is no page, or a tag that every page needs is missing or damaged.
    """
    try:
        first = _first_offset(data)
        tags, following = _read_page(data, first)
        layout = _to_layout(data[:4], tags, _has_more_pages(data, following, first))
        _check_places(layout, tags, len(data))
        if _has_more_slices(layout, tags, len(data)):
            layout = replace(layout, has_more_pages=True)
        return layout
    except (
        AttributeError,
        IndexError,
        OverflowError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        if isinstance(error, TiffError):
            raise
        raise TiffError("it is a TIFF with damaged tags, or a truncated one") from None


def _first_offset(data: bytes) -> int:
    is_big = data[2:4] in (b"+\0", b"\0+")
    word, place = ("Q", 8) if is_big else ("I", 4)
    offset: int = struct.unpack_from(_order(data) + word, data, place)[0]
    return offset


def _order(data: bytes) -> str:
    return "<" if data.startswith(b"II") else ">"


def _read_page(data: bytes, offset: int) -> tuple[dict[int, Any], int]:
    """Return the tags of a page, numbers or bytes, and the offset of the next page, 0 for none.

    Raises:
        struct.error: the page is not within the file.
    """
    order, is_big = _order(data), data[2:4] in (b"+\0", b"\0+")
    count_type, entry, word = ("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I")
    if offset < 8:
        raise TiffError("it is a truncated TIFF: its first page is missing")
    (count,) = struct.unpack_from(order + count_type, data, offset)
    place = offset + struct.calcsize(order + count_type)
    length = struct.calcsize(order + entry)
    if count * length > len(data):
        raise struct.error
    tags: dict[int, Any] = {}
    for number in range(count):
        tag, kind, values, field = struct.unpack_from(order + entry, data, place + number * length)
        if kind in _TYPES and tag in _TAGS and values:
            one = struct.calcsize(order + _TYPES[kind])
            start = struct.unpack(order + word, field)[0] if one * values > len(field) else None
            held = field if start is None else data[start : start + one * values]
            if len(held) < one * values:
                raise struct.error
            if tag in _BYTES:
                tags[tag] = held[:values]
            elif tag in _LONG:
                tags[tag] = np.frombuffer(held, f"{order}{_TYPES[kind]}", values)
            elif values <= MAX_CHANNELS:
                tags[tag] = struct.unpack_from(f"{order}{values}{_TYPES[kind]}", held)
    following = place + count * length
    return tags, struct.unpack_from(order + word, data, following)[0]


def _has_more_pages(data: bytes, offset: int, first: int) -> bool:
    """Return whether a later page is an image of its own, not a preview or a mask."""
    seen = {0, first}
    while offset not in seen and len(seen) < _MAX_PAGES:
        seen.add(offset)
        tags, offset = _read_page(data, offset)
        if not _subfile(tags) & (PREVIEW | _MASK):
            return True
    return False


def _subfile(tags: dict[int, Any]) -> int:
    """Return NewSubfileType, or what the older tag says."""
    old = PREVIEW if tags.get(_OLD_SUBFILE, (0,))[0] == _OLD_REDUCED else 0
    kind: int = tags.get(_SUBFILE, (old,))[0]
    return kind


def _check_places(layout: TiffLayout, tags: dict[int, Any], length: int) -> None:
    """Check that every strip or tile was written; decoders take what is missing as zeros.

    Raises:
        TiffError: one has no place in the file.
    """
    planes = layout.samples if layout.planar == 2 else 1
    if layout.tile is not None:
        columns, rows = layout.tile
        count = -(-layout.width // columns) * -(-layout.height // rows) * planes
    else:
        count = -(-layout.height // max(1, min(tags.get(278, (2**32,))[0], layout.height))) * planes
    kind = "strip" if layout.tile is None else "tile"
    offsets, lengths = (tags.get(tag) for tag in _PLACES[layout.tile is not None])
    if offsets is None or (lengths is not None and len(lengths) < count) or len(offsets) < count:
        raise TiffError(f"it is a truncated TIFF: not all of its {count:,} {kind}s have a place")
    wrong = (offsets[:count] == 0) | (offsets[:count] >= length)
    if lengths is not None:
        wrong = wrong | (lengths[:count] == 0)
        if layout.tile is not None:  # strips may be shorter than their stated length
            wrong = wrong | (lengths[:count] > length - np.minimum(offsets[:count], length))
    if wrong.any():
        raise TiffError(
            f"it is a truncated TIFF: {np.count_nonzero(wrong):,} of its {count:,} {kind}s were "
            f"never written, the first is number {int(np.argmax(wrong)) + 1:,}"
        )


def _has_more_slices(layout: TiffLayout, tags: dict[int, Any], length: int) -> bool:
    """Return whether slices follow the first one without a page of their own.

    ImageJ writes stacks above 4 GiB so, and tifffile with `truncate`: the description has their
    number, or the shape.
    """
    text = tags.get(_DESCRIPTION, b"").rstrip(b"\0").decode("latin1")
    page = layout.width * layout.height * layout.samples
    slices = 1
    if text.startswith("ImageJ=") and (found := _IMAGES.search(text)):
        slices = int(found[1])
    elif text.startswith("{") and (found := _SHAPE.search(text)):
        slices = math.prod(int(side) for side in found[1].split(",") if side.strip()) // page
    first = int(tags[_PLACES[layout.tile is not None][0]][0])
    held = slices * page * max(1, layout.bits[0] // 8)
    return slices > 1 and layout.compression == 1 and first + held <= length


def _to_layout(start: bytes, tags: dict[int, Any], has_more_pages: bool) -> TiffLayout:
    for name, tag in (("width", 256), ("height", 257), ("photometric interpretation", 262)):
        if tag not in tags:
            raise TiffError(f"it is a TIFF with damaged tags: it has no {name}")

    def first(tag: int, default: int) -> int:
        number: int = tags.get(tag, (default,))[0]
        return number

    layout = TiffLayout(
        start=start,
        width=first(256, 0),
        height=first(257, 0),
        samples=first(277, 1),
        bits=tags.get(258, (1,)),
        formats=tags.get(339, (SampleFormat.UNSIGNED,)),
        photometric=first(262, 0),
        extra=tags.get(338, ()),
        compression=first(259, 1),
        predictor=first(317, 1),
        planar=first(284, 1),
        fill_order=first(266, 1),
        orientation=first(274, 1),
        tile=(first(322, 0), first(323, 0)) if 322 in tags else None,
        subfile=_subfile(tags),
        depth=first(32997, 1),
        has_more_pages=has_more_pages,
        profile=tags.get(_PROFILE),
        inks=first(_INK_SET, _CMYK_INKS),
        colormap=tags.get(_COLORMAP, ()),
        gdal_metadata=tags.get(_GDAL_METADATA, b""),
        gdal_no_data=tags.get(_GDAL_NO_DATA, b""),
    )
    if min(layout.width, layout.height, layout.samples, layout.depth, *(layout.tile or ())) < 1:
        raise TiffError("it is a TIFF with damaged tags: its sizes are not positive")
    return layout
