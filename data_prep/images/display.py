"""Images of any type and number of bands as 8-bit colour, for contact sheets and pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 1, 99
"""Percentiles of a band that are drawn black and white."""


def choose_bands(values: NDArray[Any], bands: Sequence[int] | None = None) -> NDArray[Any]:
    """Return the three bands of images that are drawn in red, green and blue.

    Args:
        values: (..., channels).
        bands: three channels, or one that is drawn in grey; None are the first three, or the first
            of fewer.
    """
    if bands is None:
        bands = (0, 1, 2) if values.shape[-1] >= 3 else (0,)
    chosen: NDArray[Any] = values[..., list(bands) * (3 // len(bands))]
    return chosen


def stretch_limits(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the 1st and the 99th percentile of each band of each image.

    Args:
        values: finite, (..., rows, columns, bands).

    Returns:
        Two arrays of shape (..., 1, 1, bands).
    """
    low, high = np.percentile(values, (LOW, HIGH), axis=(-3, -2), keepdims=True)
    return low, high


def stretch(values: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.float64]:
    """Return values scaled so that `low` becomes 0 and `high` 1, clipped to that range."""
    scaled = (values - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
    clipped: NDArray[np.float64] = scaled.clip(0, 1)
    return clipped


def to_display(values: NDArray[Any], bands: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Return an image as uint8 RGB (rows, columns, 3); other types than uint8 are stretched.

    Args:
        values: (rows, columns, channels), with NaN where there is no value.
        bands: see `choose_bands`.
    """
    chosen = choose_bands(values, bands)
    if chosen.dtype == np.uint8:
        return np.ascontiguousarray(chosen)
    numbers = np.nan_to_num(chosen.astype(np.float64), nan=float(np.nanmin(chosen)))
    colour: NDArray[np.uint8] = np.rint(255 * stretch(numbers, *stretch_limits(numbers))).astype(
        np.uint8
    )
    return colour
