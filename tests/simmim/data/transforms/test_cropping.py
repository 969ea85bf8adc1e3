import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simmim.data.transforms.cropping import center_crop_resize, random_resized_crop

USUAL: dict[str, tuple[float, float]] = {"scale": (0.67, 1.0), "ratio": (3 / 4, 4 / 3)}


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["L", "RGB", "RGBA"]),
    seed=st.integers(0, 99),
)
def test_crops_of_any_image_have_the_size_asked_for(
    width: int, height: int, size: tuple[int, int], mode: str, seed: int
) -> None:
    image = np.full((height, width, len(mode)), 77, dtype=np.uint8)
    random = random_resized_crop(image, size, np.random.default_rng(seed), **USUAL)
    middle = center_crop_resize(image, size, crop_pct=0.875)
    for crop in (random, middle):
        assert crop.shape == (len(mode), *size)
        assert crop.dtype == torch.uint8
        assert torch.equal(crop, torch.full_like(crop, 77))


def position_image(width: int, height: int) -> np.ndarray:
    """Each pixel says where it is: red its column, green its row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)


def test_random_crops_keep_to_scale_and_ratio() -> None:
    image = position_image(140, 140)
    shares, ratios = [], []
    for seed in range(400):
        crop = random_resized_crop(image, (32, 32), np.random.default_rng(seed), **USUAL).int()
        columns, rows = crop[0, 16], crop[1, :, 16]
        # The centres of the outer pixels lie half a step inside of the part.
        width = float(columns[-1] - columns[0]) * 32 / 31
        height = float(rows[-1] - rows[0]) * 32 / 31
        shares.append(width * height / 140**2)
        ratios.append(width / height)
    assert 0.62 < min(shares) < 0.72
    assert 0.93 < max(shares) < 1.05
    assert 0.70 < min(ratios) < 0.85
    assert 1.20 < max(ratios) < 1.40


def test_a_crop_is_cut_before_it_is_resized() -> None:
    """Equal to Pillow's own cut and antialiased bicubic resize, within a rounding."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    crop = center_crop_resize(image, (20, 20), crop_pct=0.5)
    part = Image.fromarray(image[16:48, 16:48])
    expected = part.resize((20, 20), Image.Resampling.BICUBIC)
    assert np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_a_full_crop_of_the_right_size_is_the_image_itself() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    middle = center_crop_resize(image, (16, 24))
    assert np.array_equal(middle.permute(1, 2, 0).numpy(), image)


def test_the_middle_of_a_wide_image() -> None:
    crop = center_crop_resize(position_image(200, 50), (50, 50)).int()
    assert crop[0, 0].tolist() == list(range(75, 125))
    assert crop[1, :, 0].tolist() == list(range(50))


@pytest.mark.parametrize("kind", ["uint16", "float16", "float32", "float64", "uint8"])
@pytest.mark.parametrize("channels", [1, 5])
def test_arrays_keep_their_type_and_are_resized_as_fractions_are(kind: str, channels: int) -> None:
    rng = np.random.default_rng(2)
    top = {"uint8": 255, "uint16": 65535}.get(kind, 1)
    pixels = (rng.random((40, 50, channels)) * top).astype(kind)
    crop = center_crop_resize(pixels, (16, 20))
    wanted = "float32" if kind == "float64" else kind
    assert (crop.dtype, crop.shape) == (getattr(torch, wanted), (channels, 16, 20))
    planes = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    exact = torch.nn.functional.interpolate(planes, (16, 20), mode="bicubic", antialias=True)[0]
    tolerance = {"uint8": 1.5, "uint16": 0.51, "float16": 1e-3}.get(kind, 1e-6)
    limits = (0, top) if wanted.startswith("u") else (-9, 9)
    assert (crop.to(torch.float32) - exact.clamp(*limits)).abs().max() <= tolerance
    same = center_crop_resize(pixels, (40, 50))
    assert np.array_equal(same.permute(1, 2, 0).numpy(), pixels.astype(wanted))
