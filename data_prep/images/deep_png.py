"""PNG of 16 bits with colour, of which Pillow keeps the upper 8, or with transparency."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.images.opening import PNG_START, load, open_picture, png_chunks

_BITS, _COLOUR_TYPE = 24, 25
_GREY, _GREY_ALPHA, _RGB, _RGBA = 0, 4, 2, 6
_WHITE = 65_535


def is_deep_png(data: bytes) -> bool:
    """Return whether a file is a PNG of 16 bits with colours, alpha or a transparent grey."""
    if not data.startswith(PNG_START) or len(data) <= _COLOUR_TYPE or data[_BITS] != 16:
        return False
    if data[_COLOUR_TYPE] == _GREY:
        return transparent_grey(data) is not None
    return data[_COLOUR_TYPE] in (_GREY_ALPHA, _RGB, _RGBA)


def transparent_grey(data: bytes) -> int | None:
    """Return the value of a grey PNG that is transparent, or None."""
    for kind, start, _ in png_chunks(data):
        if kind == b"tRNS":
            return int.from_bytes(data[start + 8 : start + 10], "big")
        if kind == b"IDAT":
            break
    return None


def read_deep_png(data: bytes) -> NDArray[np.uint16]:
    """Return the values of such a PNG as stored, (height, width, 4): RGB and alpha.

    Raises:
        Exception: nearly any type, on hostile bytes.
    """
    if data[_COLOUR_TYPE] == _GREY_ALPHA:
        # As four bytes a pixel: upper and lower byte of grey, and of alpha.
        parts = _unpack(data, "RGBA", "RGBA").astype(np.uint16)
        grey, alpha = (parts[..., first] << 8 | parts[..., first + 1] for first in (0, 2))
        return np.stack([grey, grey, grey, alpha], axis=2)
    if data[_COLOUR_TYPE] == _GREY:
        with open_picture(data, ("PNG",)) as image:
            grey = np.asarray(load(image, data)).astype(np.uint16)
        alpha = np.where(grey == transparent_grey(data), 0, _WHITE).astype(np.uint16)
        return np.stack([grey, grey, grey, alpha], axis=2)
    mode = "RGB" if data[_COLOUR_TYPE] == _RGB else "RGBA"
    # Read as if little-endian, a value's lower byte is the one that is kept.
    upper, lower = (_unpack(data, mode, f"{mode};16{order}") for order in "BL")
    values = upper.astype(np.uint16) << 8 | lower
    if mode == "RGBA":
        return np.asarray(values, dtype=np.uint16)
    alpha = np.full(values.shape[:2], _WHITE, dtype=np.uint16)
    with open_picture(data, ("PNG",)) as image:
        key = image.info.get("transparency")
    if isinstance(key, tuple):
        alpha[(values == np.array(key)).all(axis=2)] = 0
    return np.dstack([values, alpha])


def to_channels(values: NDArray[np.uint16], channels: int) -> NDArray[np.uint16]:
    """Return RGB and alpha as 1 (grey), 3 (RGB, on white) or 4 channels."""
    if channels == 4:
        return values
    colours, alpha = values[..., :3], values[..., 3:].astype(np.uint64)
    if values[..., 3].min() < _WHITE:
        mixed = colours * alpha + _WHITE * (_WHITE - alpha)
        colours = ((mixed + _WHITE // 2) // _WHITE).astype(np.uint16)
    if channels == 3:
        return np.ascontiguousarray(colours)
    # As Pillow: ITU-R 601-2.
    weighted = colours.astype(np.uint64) @ np.array([19595, 38470, 7471], dtype=np.uint64)
    grey: NDArray[np.uint16] = ((weighted + 0x8000) >> 16).astype(np.uint16)[..., None]
    return grey


def _unpack(data: bytes, mode: str, raw_mode: str) -> NDArray[Any]:
    """Decode the pixels as if the file had this mode of Pillow, packed like this."""
    with open_picture(data, ("PNG",)) as image:
        image._mode = mode  # differs for grey with alpha only
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        loaded: Image.Image = load(image, b"")
        return np.asarray(loaded)
