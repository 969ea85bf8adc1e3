from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.images.display import to_display
from simmim import random_mask
from simmim.method.masking import enlarge_mask
from simmim.method.targets import NormalisedPixels
from simmim.report.panels import GAP, HEADER, reconstruction_panel

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def random_colors(*shape: int, seed: int) -> Tensor:
    """Colours between 0 and 1 that bytes hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator) / 255


def normalise(colors: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (colors - mean) / std


def tile(panel: np.ndarray, row: int, column: int, size: tuple[int, int], factor: int) -> Tensor:
    """The pixels of a tile of the first block, one for each pixel of the image."""
    height, width = size[0] * factor, size[1] * factor
    top, left = HEADER + row * (height + GAP), GAP + column * (width + GAP)
    pixels = panel[top : top + height : factor, left : left + width : factor]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize("norm_target", [False, True])
def test_tiles_show_original_mask_and_prediction(tmp_path: Path, norm_target: bool) -> None:
    colors, predicted = random_colors(3, 3, 64, 96, seed=0), random_colors(3, 3, 64, 96, seed=1)
    reconstruction = normalise(predicted)
    if norm_target:  # the right answer, so that colours come back whatever the statistics are
        target, predicted = NormalisedPixels(3), colors
        reconstruction = target.to_pixels(target(normalise(colors)), normalise(colors))
    mask = random_mask(3, (4, 6), 0.6, torch.Generator().manual_seed(0))
    path = tmp_path / "new" / "panel.png"
    options = {"mean": MEAN, "std": STD}
    reconstruction_panel(normalise(colors), mask, reconstruction, path=path, **options)  # type: ignore[arg-type]
    with Image.open(path) as image:
        panel = np.asarray(image)
    hidden = enlarge_mask(mask, 16)[:, None]
    expected = [
        colors,
        torch.where(hidden, torch.tensor(0.5), colors),
        predicted,
        torch.where(hidden, predicted, colors),
    ]
    for row in range(3):
        for column in range(4):
            shown = tile(panel, row, column, (64, 96), 2)
            assert (shown - expected[column][row]).abs().max() <= 1.01 / 255


@pytest.mark.parametrize(
    ("count", "side", "factor", "rows", "blocks"),
    [(1, 32, 4, 1, 1), (4, 192, 1, 4, 1), (8, 64, 2, 4, 2), (5, 100, 2, 3, 2)],
)
def test_small_images_are_enlarged_and_many_go_in_two_blocks(
    tmp_path: Path, count: int, side: int, factor: int, rows: int, blocks: int
) -> None:
    images = normalise(random_colors(count, 3, side, side, seed=0))
    mask = random_mask(count, (2, 2), 0.5)
    reconstruction_panel(images, mask, images, mean=MEAN, std=STD, path=tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as panel:
        width, height = panel.size
    assert height == HEADER + rows * (side * factor + GAP)
    assert width == blocks * (4 * (side * factor + GAP) + 2 * GAP) - GAP


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels_are_drawn(tmp_path: Path, channels: int) -> None:
    colors = random_colors(1, channels, 128, 128, seed=0)
    path = tmp_path / "panel.png"
    statistics = {"mean": [0.0] * channels, "std": [1.0] * channels}
    reconstruction_panel(colors, random_mask(1, (4, 4), 0.5), colors, **statistics, path=path)
    with Image.open(path) as panel:
        shown = tile(np.asarray(panel), 0, 0, (128, 128), 1)
    expected = colors[0, :3] if channels > 2 else colors[0, :1].expand(3, -1, -1)
    assert (shown - expected).abs().max() < 1e-6


def test_a_diverged_prediction_is_still_drawn(tmp_path: Path) -> None:
    images = normalise(random_colors(1, 3, 32, 32, seed=0))
    broken = torch.full_like(images, torch.nan)
    mask = random_mask(1, (2, 2), 0.5)
    reconstruction_panel(images, mask, broken, mean=MEAN, std=STD, path=tmp_path / "panel.png")
    assert [path.name for path in tmp_path.iterdir()] == ["panel.png"]


def test_mismatched_shapes_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    images, mask = normalise(random_colors(2, 3, 32, 32, seed=0)), random_mask(2, (2, 2), 0.5)
    path = tmp_path / "panel.png"
    with pytest.raises(ValueError, match="do not match"):
        reconstruction_panel(images, mask, images[:1], mean=MEAN, std=STD, path=path)
    with pytest.raises(ValueError, match="do not match"):
        reconstruction_panel(images[:0], mask[:0], images[:0], mean=MEAN, std=STD, path=path)
    with pytest.raises(ValueError, match=r"mean has .*per channel"):
        reconstruction_panel(images, mask, images, mean=(0.5,), std=STD, path=path)
    for wrong in (mask[0], mask[:1], mask[:, :1]):
        with pytest.raises(ValueError, match="does not fit images"):
            reconstruction_panel(images, wrong, images, mean=MEAN, std=STD, path=path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bands", [None, (3, 0, 1), (2,)])
def test_16_bit_images_are_stretched_like_contact_sheets(
    tmp_path: Path, bands: tuple[int, ...] | None
) -> None:
    """Values that fill a hundredth of the range are neither black nor of another scale."""
    stored = (random_colors(1, 4, 128, 128, seed=0) * 600 + 100).to(torch.uint16)
    mean, std = (0.006, 0.007, 0.006, 0.007), (0.002, 0.003, 0.002, 0.003)
    offset, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    images = (stored.float() / 65535 - offset) / scale
    path = tmp_path / "panel.png"
    options = {"mean": mean, "std": std, "bands": bands}
    mask = random_mask(1, (4, 4), 0.5)
    reconstruction_panel(images, mask, images, path=path, stretched=True, **options)  # type: ignore[arg-type]
    expected = to_display(stored[0].permute(1, 2, 0).numpy(), bands)
    with Image.open(path) as panel:
        for column in (0, 2, 3):
            shown = tile(np.asarray(panel), 0, column, (128, 128), 1).permute(1, 2, 0) * 255
            assert (shown - torch.from_numpy(expected)).abs().max() <= 2
    assert 100 < expected.mean() < 155
    brighter = images + 0.5
    reconstruction_panel(images, mask, brighter, path=path, stretched=True, **options)  # type: ignore[arg-type]
    with Image.open(path) as panel:
        original, predicted = (
            tile(np.asarray(panel), 0, column, (128, 128), 1).mean() for column in (0, 2)
        )
    assert predicted > original + 0.1  # the limits are those of the original
