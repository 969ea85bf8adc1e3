"""Turning images upright, as EXIF, XMP or a TIFF tag says."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose that turns an image of each EXIF orientation upright."""

_TAG = 0x0112
_METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Entries of `Image.info` that may hold the orientation; they no longer hold for a turned image."""


def orientation_of(image: Image.Image) -> int:
    """Return the orientation of an image, 2 to 8; 1 if it is upright, or if EXIF is damaged."""
    try:
        found = image.getexif().get(_TAG, 1)
    except MemoryError:
        raise
    # Pillow raises nearly any type on damaged EXIF, which does not affect the pixels.
    except Exception:
        return 1
    return found if found in ORIENTATIONS else 1


def orientation_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose that turns an image upright; None if it is, or if EXIF is damaged."""
    return ORIENTATIONS.get(orientation_of(image))


def turn_upright(image: Image.Image) -> Image.Image:
    """Return a loaded picture turned upright; damaged EXIF is ignored."""
    method = orientation_transpose(image)
    if method is None:
        return image
    turned = image.transpose(method)
    for name in _METADATA:
        turned.info.pop(name, None)
    return turned


def turn_array(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an array (height, width, …) of an EXIF orientation upright; unknown ones are upright."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    if rows:
        values = np.flip(values, 0)
    return np.flip(values, 1) if columns else values
