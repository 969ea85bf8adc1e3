"""TIFF: which files Pillow reads right, and the rest through tifffile.

Pillow reads some layouts of TIFF with clipped, cut or missing values and says nothing. It is only
asked for those of `reads_right`, which tests compare with tifffile; for everything else tifffile
and imagecodecs are needed (`pip install 'simmim[tiff]'`), and what they cannot read is rejected by
name.
"""

import io
import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.images.arrays import MAX_CHANNELS
from data_prep.images.orientation import turn_array
from data_prep.images.tiff_layout import (
    KINDS,
    PREVIEW,
    Photometric,
    SampleFormat,
    TiffError,
    TiffLayout,
)

_BIG_BIG_ENDIAN = b"MM\0+"
_PICTURE_CODECS = (33003, 33005, 34712)
_LOSSLESS = (1, 5, 8, 32773, 32946)
_PREDICTED = (5, 8, 32946)
_MAY_BE_PREDICTED = (*_PREDICTED, 32773, 34925, 50000)
"""Compressions with which values are written through a predictor; with others readers disagree."""
_BITS = {"uint": (*range(1, 17), 32, 64), "int": (8, 16, 32, 64), "float": (16, 24, 32, 64)}
_PREDICTED_BITS = {2: (8, 16, 32, 64), 3: (8, 16, 24, 32, 64)}
"""Bits per value for which a predictor is defined."""
_FAX = (2, 3, 4)
_JPEG = 7
_RIGHT = {
    *(
        (colours, SampleFormat.UNSIGNED, bits, 1, ())
        for colours in (0, 1, Photometric.PALETTE)
        for bits in (1, 2, 4, 8)
    ),
    (Photometric.BLACK_IS_ZERO, SampleFormat.UNSIGNED, 16, 1, ()),
    (Photometric.BLACK_IS_ZERO, SampleFormat.SIGNED, 16, 1, ()),
    (Photometric.BLACK_IS_ZERO, SampleFormat.SIGNED, 32, 1, ()),
    (Photometric.BLACK_IS_ZERO, SampleFormat.FLOAT, 32, 1, ()),
    (Photometric.BLACK_IS_ZERO, SampleFormat.UNSIGNED, 8, 2, (2,)),
    (Photometric.RGB, SampleFormat.UNSIGNED, 8, 3, ()),
    (Photometric.RGB, SampleFormat.UNSIGNED, 8, 4, (1,)),
    (Photometric.RGB, SampleFormat.UNSIGNED, 8, 4, (2,)),
    (Photometric.CMYK, SampleFormat.UNSIGNED, 8, 4, ()),
    (Photometric.YCBCR, SampleFormat.UNSIGNED, 8, 3, ()),
    (Photometric.LAB, SampleFormat.UNSIGNED, 8, 3, ()),
}
"""What Pillow reads right: photometric, sample format, bits, bands, extra bands."""
_EXACT_IN_FLOAT64 = 2**53


def reads_right(layout: TiffLayout) -> bool:
    """Return whether Pillow decodes this layout with the right values."""
    bits, kinds = set(layout.bits), set(layout.formats)
    if len(bits) > 1 or len(kinds) > 1 or layout.depth > 1 or layout.fill_order != 1:
        return False
    if layout.start == _BIG_BIG_ENDIAN or (layout.compression in _FAX and bits != {1}):
        return False
    if layout.photometric == Photometric.YCBCR and layout.compression != _JPEG:
        return False
    if layout.photometric == Photometric.CMYK and not layout.colours:
        return False  # of other inks
    kind = kinds.pop()
    if kind != SampleFormat.UNSIGNED and layout.start.startswith(b"MM") and layout.compression != 1:
        return False  # libtiff swaps the bytes, and Pillow swaps them back
    cell = (layout.photometric, kind, bits.pop(), layout.samples, layout.extra)
    return cell in _RIGHT and _unpacks_right(layout)


def _unpacks_right(layout: TiffLayout) -> bool:
    """Return whether Pillow reverses compression, predictor and planes as it should."""
    if layout.samples > 1 and layout.planar != 1:
        return False
    if layout.predictor != 1:
        differences = layout.predictor == 2 and set(layout.bits) == {8}
        return differences and layout.compression in _PREDICTED
    if layout.compression == _JPEG:
        return set(layout.bits) == {8} and layout.photometric in (1, 2, 6) and not layout.extra
    return layout.compression in (*_LOSSLESS, *_FAX)


def check_layout(layout: TiffLayout, max_pixels: int) -> None:
    """Check that a page can be read with the right values, before memory is allocated for it.

    Raises:
        TiffError: it cannot; the message names what it is.
    """
    if layout.subfile & PREVIEW:
        raise TiffError("its first page is a preview of another one, as in camera raw files")
    if layout.depth > 1:
        raise TiffError(f"it is a TIFF of a volume of {layout.depth:,} slices: {_ARRAY}")
    if layout.samples > MAX_CHANNELS:
        raise TiffError(f"it is {layout}: that is more than {MAX_CHANNELS:,} bands")
    # A compressed file may promise any number of values: four bands are as much as RGBA.
    values = layout.width * layout.height * max(1, math.ceil(layout.samples / 4))
    if layout.tile is not None:
        rows = layout.tile[1] * math.ceil(layout.height / layout.tile[1])
        values = max(values, layout.tile[0] * math.ceil(layout.width / layout.tile[0]) * rows // 4)
    if values > max_pixels:
        raise TiffError(
            f"it is {layout} of {layout.width}x{layout.height} pixels, four bands of which count "
            f"as one: more than max-pixels {max_pixels:,}"
        )


_QUIET = logging.NullHandler()
"""Keeps tifffile's warnings off the console: what matters is raised."""
_ARRAY = "write it as an array (.npy), height x width x channels"


def read_tiff(data: bytes, layout: TiffLayout) -> NDArray[Any]:
    """Return the values of the first page through tifffile, upright, black as zero.

    Returns:
        (height, width) or (height, width, bands): uint8 and uint16 as stored (fewer than 8 bits
        scaled to 0 to 255), floating point as stored, other integers as the floating-point type
        that holds all of them.

    Raises:
        TiffError: the values cannot be read, or have no type that training takes.
    """
    page_type = _check_values(layout)
    try:
        import imagecodecs  # noqa: F401, PLC0415
        import tifffile  # noqa: PLC0415
    except ImportError:
        raise TiffError(
            f"it is {layout}, which needs tifffile: pip install 'simmim[tiff]', or {_ARRAY}"
        ) from None
    logging.getLogger("tifffile").addHandler(_QUIET)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            values: NDArray[Any] = page.asarray(maxworkers=1)
            values = values.reshape(-1, layout.height, layout.width, _contiguous(layout))
    except MemoryError:
        raise
    # tifffile and imagecodecs raise nearly any type when the bytes are hostile.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TiffError(
            f"it is {layout}, which tifffile cannot decode: {reason}; if it is whole, {_ARRAY}"
        ) from None
    values = np.moveaxis(values, 0, -1)[..., 0] if layout.planar == 1 else _join_planes(values)
    if layout.photometric == Photometric.PALETTE:
        values = _look_up(values[..., 0], layout)
    else:
        values = _convert(values, layout, page_type)
    upright = turn_array(values, layout.orientation)
    return np.ascontiguousarray(upright[..., 0] if upright.shape[2] == 1 else upright)


def _look_up(indices: NDArray[Any], layout: TiffLayout) -> NDArray[np.uint8]:
    palette = layout.palette
    if int(indices.max()) >= len(palette):
        raise TiffError(f"it is {layout} with colours that its palette does not have")
    colours: NDArray[np.uint8] = palette[indices]
    return colours


def _contiguous(layout: TiffLayout) -> int:
    return layout.samples if layout.planar == 1 else 1


def _join_planes(values: NDArray[Any]) -> NDArray[Any]:
    """(bands, height, width, 1) → (height, width, bands)."""
    return np.moveaxis(values[..., 0], 0, -1)


def _check_values(layout: TiffLayout) -> str:
    """Return uint, int or float.

    Raises:
        TiffError: the values have no meaning or no type that training takes.
    """
    kind = KINDS.get(layout.formats[0], "complex")
    if len(set(layout.bits)) > 1 or len(set(layout.formats)) > 1 or kind == "complex":
        raise TiffError(f"it is {layout}, a type that training does not take: {_ARRAY}")
    bits = layout.bits[0]
    is_inexact = layout.compression in _PICTURE_CODECS and bits > 16
    is_packed = bits < 8 and layout.samples > 1 and layout.planar == 1
    if is_packed or is_inexact or bits not in _BITS[kind] or not _has_defined_predictor(layout):
        raise TiffError(f"it is {layout}, which is not sure to be decoded exactly: {_ARRAY}")
    plain = (
        Photometric.WHITE_IS_ZERO,
        Photometric.BLACK_IS_ZERO,
        Photometric.RGB,
        Photometric.CMYK,
    )
    palette = layout.photometric == Photometric.PALETTE and layout.samples == 1 and kind == "uint"
    if palette and bits <= 8:
        return kind
    is_jpeg = layout.compression == _JPEG and layout.samples == 3 and layout.planar == 1
    if layout.photometric == Photometric.YCBCR and is_jpeg and bits == 8:
        return kind  # the codec converts it to RGB
    if layout.photometric not in plain:
        raise TiffError(f"it is {layout}, colours that would have to be guessed: {_ARRAY}")
    if layout.photometric == Photometric.WHITE_IS_ZERO and kind != "uint":
        raise TiffError(f"it is {layout}: white has no defined value in {layout.type}: {_ARRAY}")
    return kind


def _has_defined_predictor(layout: TiffLayout) -> bool:
    """Return whether all readers agree on the values behind the predictor."""
    if layout.predictor == 1:
        return True
    is_defined = layout.bits[0] in _PREDICTED_BITS.get(layout.predictor, ())
    return is_defined and layout.compression in _MAY_BE_PREDICTED


def _convert(values: NDArray[Any], layout: TiffLayout, kind: str) -> NDArray[Any]:
    """Return the values with black as zero, in a type that training takes."""
    bits = layout.bits[0]
    values = values.astype(np.uint8) if values.dtype == bool else values
    if layout.photometric == Photometric.WHITE_IS_ZERO:
        colour = values[..., :1] if layout.samples > 1 else values
        white = np.array(2**bits - 1).astype(colour.dtype)
        values = np.concatenate([white - colour, values[..., 1:]], axis=2)
    if kind == "float":
        return values
    if kind == "uint" and bits < 8:
        scaled = (values.astype(np.uint16) * 255 * 2 + 2**bits - 1) // (2 * (2**bits - 1))
        return np.asarray(scaled, dtype=np.uint8)
    if bits <= 16:
        held = np.float32 if kind == "int" else np.uint8 if bits == 8 else np.uint16
        return np.asarray(values, dtype=held)
    low, high = int(values.min()), int(values.max())
    if max(-low, high) > _EXACT_IN_FLOAT64:
        raise TiffError(
            f"it is {layout} with values from {low:,} to {high:,}, which no type that training "
            f"takes holds exactly: {_ARRAY} of float64 or uint16"
        )
    return np.asarray(values, dtype=np.float64)
