"""TIFFs, written and read for the tests."""

import io

import numpy as np
import pytest

from data_prep.images.checking import check_image, read_pixels


def write_tiff(values: np.ndarray, **options: object) -> bytes:
    """Write values as tifffile does, without its metadata."""
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **{"metadata": None, **options})
    return buffer.getvalue()


def stored_values(data: bytes, **options: object) -> np.ndarray:
    """Return the values that shards hold of an image."""
    checked = check_image(data, **options)
    return read_pixels(checked.data, checked.extension)
