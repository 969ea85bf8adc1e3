"""Channel names given in an image file: its colours, or the descriptions of its bands."""

import re
from dataclasses import dataclass

from data_prep.channels import (
    GRAY,
    RGB,
    RGBA,
    ChannelNameError,
    ChannelNames,
    are_pictures,
    compare_names,
    describe,
    read_names,
)
from data_prep.format.text import count_noun
from data_prep.images.arrays import read_header
from data_prep.images.damage import read_jpeg_header
from data_prep.images.tiff_layout import STARTS, TiffError, TiffLayout, read_layout

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_PNG_COLOUR, _PNG_CHANNELS = 25, {0: 1, 2: 3, 3: 3, 4: 4, 6: 4}
"""Offset of a PNG's colour type, and the channels that a picture of each is decoded to; grey with
transparency has four."""
_ITEM = re.compile(rb"<Item\b([^>]{1,500})>([^<]{0,500})</Item>")
_SAMPLE = re.compile(rb"""\bsample=["'](\d{1,5})["']""")
_DESCRIPTION = re.compile(rb"""\bname=["']DESCRIPTION["']""", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class NamesInFile:
    """Channel names given in a file."""

    names: ChannelNames
    described: bool
    """Whether its bands are described one by one, rather than known by the kind of picture."""


def names_in_file(data: bytes, extension: str) -> NamesInFile | None:
    """Return the channel names given in an image file; None if there are none, as in arrays.

    Args:
        data: the file.
        extension: file name extension; npy distinguishes arrays from pictures.
    """
    if extension == "npy":
        return None
    if data.startswith(STARTS):
        try:
            return tiff_names(read_layout(data))
        except TiffError:  # decoding it will report it
            return None
    return NamesInFile(names=GRAY if _is_grey(data) else RGB, described=False)


def no_data_in_file(data: bytes) -> float | None:
    """Return the no-data value given in an image file, if any."""
    if not data.startswith(STARTS):
        return None
    try:
        return read_layout(data).no_data
    except TiffError:
        return None


def check_names(told: NamesInFile | None, data: bytes, extension: str, names: ChannelNames) -> str:
    """Return why an image cannot have channels of these names; empty if it can.

    Args:
        told: names given in its own file.
        data: the image as it is stored.
        extension: file name extension of the stored image.
        names: the names that are given.

    Raises:
        ArrayError: it is a damaged array.
    """
    if told is not None and told.described and told.names != names:
        return (
            f"its bands are described as {describe(told.names)}, and those of the set are "
            f"{describe(names)}: {compare_names(told.names, names)}"
        )
    is_array = extension == "npy"
    if not is_array and are_pictures(names):
        return ""  # the decoder converts them
    counts = (read_header(data).channels,) if is_array else _channels_of_picture(data)
    if len(names) in counts:
        return ""
    has = count_noun(counts[-1], "channel")
    return f"it has {has}, and the set names {len(names)}: {describe(names)}"


def _channels_of_picture(data: bytes) -> tuple[int, ...]:
    """Return the numbers of channels that a picture may have."""
    if data.startswith(_PNG):
        return (_PNG_CHANNELS.get(data[_PNG_COLOUR], 3),)
    if data.startswith(_JPEG):
        return (1,) if _is_grey(data) else (3,)
    return 1, 4, 3


def tiff_names(layout: TiffLayout) -> NamesInFile | None:
    """Return the names given in the tags of a TIFF: GDAL's band descriptions, or its colours."""
    described = _descriptions(layout)
    if described is not None:
        return NamesInFile(names=described, described=True)
    colours = {"L": GRAY, "LA": GRAY, "RGB": RGB, "RGBA": RGBA, "CMYK": RGB}.get(layout.colours)
    if colours == RGBA and layout.type == "uint8":
        colours = RGB  # a picture, which is shown on white unless four channels are asked for
    return None if colours is None else NamesInFile(names=colours, described=False)


def _descriptions(layout: TiffLayout) -> ChannelNames | None:
    found: dict[int, str] = {}
    for attributes, text in _ITEM.findall(layout.gdal_metadata):
        place = _SAMPLE.search(attributes)
        if place is not None and _DESCRIPTION.search(attributes):
            plain = re.sub(r"[^a-z0-9]+", "_", text.decode("utf-8", "replace").lower())
            found[int(place[1])] = plain.strip("_")
    if sorted(found) != list(range(layout.samples)):
        return None
    try:
        return read_names([found[band] for band in range(layout.samples)])
    except ChannelNameError:  # two bands of one description, for example
        return None


def _is_grey(data: bytes) -> bool:
    if data.startswith(_PNG):
        return data[_PNG_COLOUR : _PNG_COLOUR + 1] in (b"\0", b"\4")  # 4: with transparency
    header = read_jpeg_header(data)
    return header is not None and header[2] == "Gray"
