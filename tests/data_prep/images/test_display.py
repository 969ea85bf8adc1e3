"""Any image as 8-bit colour: stretched to its own range, with chosen bands."""

import numpy as np
import pytest

from data_prep.images.display import choose_bands, stretch, stretch_limits, to_display


def ramp(*shape: int, low: float, high: float, dtype: str) -> np.ndarray:
    return np.linspace(low, high, int(np.prod(shape))).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint16", 900, 1300), ("float32", -5.0, 4.0), ("float64", 0, 1e-4), ("uint16", 0, 65535)],
)
def test_a_narrow_range_fills_black_to_white(dtype: str, low: float, high: float) -> None:
    shown = to_display(ramp(40, 50, 1, low=low, high=high, dtype=dtype))
    assert (shown.shape, shown.dtype) == ((40, 50, 3), np.uint8)
    assert (shown[..., 0] == shown[..., 1]).all()
    assert (shown.min(), shown.max()) == (0, 255)
    assert 120 <= shown[20].mean() <= 135  # the middle stays in the middle


def test_outliers_do_not_darken_the_rest() -> None:
    values = ramp(40, 50, 1, low=100, high=200, dtype="uint16")
    values[0, 0] = 65535
    assert to_display(values)[20].mean() > 100


def test_8_bits_are_drawn_as_they_are() -> None:
    values = ramp(8, 8, 3, low=0, high=40, dtype="uint8")
    np.testing.assert_array_equal(to_display(values), values)
    np.testing.assert_array_equal(to_display(values, (2, 1, 0)), values[..., ::-1])


def test_bands_are_chosen() -> None:
    values = np.arange(6) + np.zeros((4, 5, 6))
    assert choose_bands(values)[0, 0].tolist() == [0, 1, 2]
    assert choose_bands(values, (5, 3, 1))[0, 0].tolist() == [5, 3, 1]
    assert choose_bands(values, (4,))[0, 0].tolist() == [4, 4, 4]
    assert choose_bands(values[..., :2])[0, 0].tolist() == [0, 0, 0]


def test_values_that_are_missing_are_dark() -> None:
    values = ramp(20, 20, 1, low=1, high=2, dtype="float32")
    values[:2] = np.nan
    assert to_display(values)[0].max() == 0


def test_each_image_and_band_has_its_own_limits() -> None:
    values = np.stack([ramp(20, 20, 2, low=0, high=high, dtype="float64") for high in (1, 1000)])
    low, high = stretch_limits(values)
    assert low.shape == (2, 1, 1, 2)
    shown = stretch(values, low, high)
    np.testing.assert_allclose(shown[0], shown[1])
    assert shown.max() == 1
