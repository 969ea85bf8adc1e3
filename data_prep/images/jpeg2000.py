"""JPEG 2000: depth, sign and meaning of its components.

Pillow shifts values of 1 to 7 bits to 8, so that white is 128 to 254, wraps white to black where it
rounds 9 bits and more to 8, and adds half of the range to signed values. It takes the last of two
or four components for transparency, and never looks at the `cdef` box, which says what they are.
"""

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STARTS = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
_SIZES = b"\xff\x4f\xff\x51"
"""Start of the codestream, and its segment of sizes."""
_COUNT, _FIRST = 40, 42
"""Offsets of the number of components and of the first one from there."""
_YCC = b"colr\1\0\0\0\0\0\x12"
_ENUMERATED = b"\1"
_OTHER_COLOURS = {
    **dict.fromkeys((1, 3, 4), "YCbCr of a kind that is not read"),
    9: "PhotoYCC",
    11: "CMY",
    13: "YCCK",
    14: "CIELab",
    19: "CIEJab",
    24: "e-sYCC",
}
"""Enumerated colour spaces that Pillow shows as RGB."""
_COLOUR, _OPACITY, _PREMULTIPLIED = 0, 1, 2
"""Types of a channel in `cdef`."""
_WHOLE, _NONE = 0, 65_535
"""Colours that a channel may be of in `cdef`, other than a number from 1: all, and none."""
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class DepthError(ValueError):
    """Values of a JPEG 2000 cannot be read right; the message says which."""


def is_jpeg2000(data: bytes) -> bool:
    """Return whether a file is a JPEG 2000, with or without a container."""
    return data.startswith(_STARTS)


def component_bits(data: bytes) -> tuple[int, ...]:
    """Return the bits of each component of a JPEG 2000, negative for signed ones."""
    place = data.find(_SIZES)
    if place < 0:
        return ()
    count = int.from_bytes(data[place + _COUNT : place + _FIRST], "big")
    kinds = data[place + _FIRST : place + _FIRST + 3 * count : 3]
    return tuple(-(1 + kind % 128) if kind >= 128 else 1 + kind for kind in kinds)


def bit_depth(data: bytes) -> int:
    """Return the largest number of bits of a component; 8 if the file does not say."""
    return max(map(abs, component_bits(data)), default=8)


def check_values(data: bytes) -> None:
    """Check that a file, if it is a JPEG 2000, has unsigned values of colours that are read.

    Raises:
        DepthError: it has not.
    """
    if not is_jpeg2000(data):
        return
    if min(component_bits(data), default=1) < 0:
        raise DepthError(
            f"it is a JPEG 2000 with signed values of {bit_depth(data)} bits: convert it to an "
            "array (.npy)"
        )
    for kind, start, stop in _header_boxes(data):
        if kind == b"colr" and data[start : start + 1] == _ENUMERATED:
            colours = int.from_bytes(data[start + 3 : min(start + 7, stop)], "big")
            if colours in _OTHER_COLOURS:
                raise DepthError(
                    f"it is a JPEG 2000 in {_OTHER_COLOURS[colours]}: convert it to PNG"
                )


def has_alpha(data: bytes) -> bool:
    """Return whether the last component of a JPEG 2000 is transparency: only `cdef` says so.

    Raises:
        DepthError: the components are not in the order of the colours, or multiplied by alpha.
    """
    last, is_alpha = len(component_bits(data)) - 1, False
    for channel, kind, colour in _definitions(data):
        if kind == _COLOUR and colour not in (channel + 1, _WHOLE, _NONE):
            raise DepthError("it is a JPEG 2000 with colours in another order: convert it to PNG")
        if kind == _PREMULTIPLIED or (kind == _OPACITY and channel != last):
            what = "alpha before colours" if kind == _OPACITY else "colours multiplied by alpha"
            raise DepthError(f"it is a JPEG 2000 with {what}: convert it to PNG")
        is_alpha = is_alpha or kind == _OPACITY
    return is_alpha


def _definitions(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (channel, type, colour) of what the `cdef` box of a JPEG 2000 defines."""
    for kind, start, stop in _header_boxes(data):
        if kind == b"cdef":
            body = data[start + 2 : stop]
            yield from struct.iter_unpack(">HHH", body[: len(body) // 6 * 6])


def _header_boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes in the header of a JP2; see `_boxes`."""
    for kind, start, stop in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            yield from _boxes(data, start, stop)


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, first byte and end of the boxes in a part of a file, as far as they are whole."""
    while start + 8 <= stop and not data.startswith(_SIZES):
        length, kind = struct.unpack_from(">I4s", data, start)
        first = start + 8
        if length == 1 and first + 8 <= stop:
            (length,) = struct.unpack_from(">Q", data, first)
            first += 8
        end = start + length if length else stop
        if not first <= end <= stop:
            return
        yield kind, first, end
        start = end


def scale_few_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Return a picture that Pillow loaded, with its components of 1 to 7 bits from 0 to 255."""
    depths = component_bits(data)
    if min(depths, default=8) >= 8:
        return image
    values = np.asarray(image)
    pixels = values.reshape(*values.shape[:2], -1).copy()
    bands = pixels.shape[2]
    depths = depths if len(depths) == bands else (max(depths),) * bands
    for band, bits in enumerate(depths):
        if bits < 8:
            stored = (pixels[..., band] >> (8 - bits)).astype(np.uint16)
            white = 255 if image.mode == "P" else 2**bits - 1  # an index stays as it is
            pixels[..., band] = (stored * 510 + white) // (2 * white)
    scaled = Image.frombytes(image.mode, image.size, pixels.tobytes())
    if image.palette is not None:
        scaled.putpalette(image.palette)
    scaled.info = image.info
    return scaled


def read_8_bits(data: bytes) -> Image.Image:
    """Return a picture of more than 8 bits, rounded to 8.

    Raises:
        DepthError: its components differ or are not RGB or grey, or imagecodecs is not installed.
        Exception: nearly any type, on hostile bytes.
    """
    try:
        import imagecodecs  # noqa: PLC0415
    except ImportError:
        raise DepthError(
            f"it is a JPEG 2000 of {bit_depth(data)} bits, which needs imagecodecs: pip install "
            "'simmim[tiff]', or convert it to an array (.npy)"
        ) from None
    depths = set(component_bits(data))
    if len(depths) != 1 or _YCC in data:
        raise DepthError("it is a JPEG 2000 of YCbCr or of several depths: convert it to PNG")
    if len(component_bits(data)) in (2, 4) and not has_alpha(data):
        raise DepthError(
            f"it is a JPEG 2000 of {bit_depth(data)} bits with a band that is not called alpha, or "
            "of CMYK: convert it to an array (.npy)"
        )
    values: NDArray[np.uint32] = imagecodecs.jpeg2k_decode(data).astype(np.uint32)
    white = 2 ** depths.pop() - 1
    reduced = np.minimum((values * 510 + white) // (2 * white), 255).astype(np.uint8)
    mode = _MODES[reduced.shape[2] if reduced.ndim == 3 else 1]
    return Image.frombytes(mode, (reduced.shape[1], reduced.shape[0]), reduced.tobytes())
