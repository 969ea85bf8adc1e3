import hashlib
import itertools
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simmim.fields import describe
from simmim.method.masking import (
    MaskGenerator,
    average_distance,
    block_mask,
    draw_masks,
    enlarge_mask,
    random_mask,
    square_mask,
)
from simmim.method.settings import Grid, hidden_count, mask_grid
from simmim.method.strategies import BlockMask, MaskSettings, RandomMask, SquareMask
from simmim.recipe import RecipeError, parse

MaskFunction = Callable[[int, Grid, float, torch.Generator | None], Tensor]

STRATEGIES = [random_mask, square_mask, block_mask]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("draw", STRATEGIES)
@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_every_image_hides_exactly_the_count(
    draw: MaskFunction, rows: int, columns: int, ratio: float, seed: int
) -> None:
    mask = draw(3, (rows, columns), ratio, generator(seed))
    assert mask.shape == (3, rows, columns)
    assert mask.dtype == torch.bool
    assert mask.flatten(1).sum(1).tolist() == [hidden_count((rows, columns), ratio)] * 3


@pytest.mark.parametrize("draw", STRATEGIES)
def test_masks_are_a_function_of_the_generator(draw: MaskFunction) -> None:
    first = draw(8, (6, 6), 0.6, generator(1))
    torch.rand(5)
    assert torch.equal(first, draw(8, (6, 6), 0.6, generator(1)))
    assert not torch.equal(first, draw(8, (6, 6), 0.6, generator(2)))
    assert len({tuple(image.flatten().tolist()) for image in first}) > 1
    assert draw(0, (6, 6), 0.6, generator(1)).shape == (0, 6, 6)


def test_paper_default_hides_22_of_36_cells() -> None:
    assert hidden_count((6, 6), 0.6) == 22
    assert hidden_count((10, 10), 0.55) == 55  # not the 56 of binary rounding
    assert hidden_count((3, 3), 0.0) == 0


def test_every_cell_is_hidden_as_often_by_random_masks() -> None:
    share = random_mask(20_000, (6, 6), 0.6, generator()).double().mean(dim=0)
    assert share.sub(22 / 36).abs().max() < 0.015


@pytest.mark.parametrize(
    ("cell", "ratio", "published", "tolerance", "draws"),
    [
        # The published figures are themselves averages over draws, of 6x6 cells the more so.
        (32, 0.3, 10.0, 0.6, 1000),
        (32, 0.5, 12.3, 0.4, 1000),
        (32, 0.6, 15.7, 0.5, 2000),
        (32, 0.7, 20.3, 1.0, 1000),
        (32, 0.8, 24.8, 1.6, 1000),
        (16, 0.6, 7.2, 0.1, 100),
        (16, 0.8, 12.5, 0.3, 200),
        (8, 0.9, 10.0, 0.3, 40),
    ],
)
def test_average_distance_equals_the_paper(
    cell: int, ratio: float, published: float, tolerance: float, draws: int
) -> None:
    masks = random_mask(draws, (192 // cell, 192 // cell), ratio, generator())
    assert average_distance(masks, cell) == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize("draw", STRATEGIES)
def test_average_distance_equals_a_search_over_all_pixels(draw: MaskFunction) -> None:
    masks = draw(4, (3, 5), 0.7, generator(3))
    distances = []
    for image in enlarge_mask(masks, 4):
        hidden, visible = image.nonzero().double(), (~image).nonzero().double()
        distances.append(torch.cdist(hidden, visible).amin(dim=1))
    assert average_distance(masks, 4) == pytest.approx(float(torch.cat(distances).mean()))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_average_distance_needs_both_hidden_and_visible(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask ratio"):
        average_distance(random_mask(2, (4, 4), ratio), 8)


@given(rows=st.integers(2, 14), columns=st.integers(2, 14), ratio=st.floats(0.05, 0.95))
def test_a_square_lies_in_the_box_nearest_to_a_square(
    rows: int, columns: int, ratio: float
) -> None:
    mask = square_mask(1, (rows, columns), ratio, generator())[0]
    hidden = int(mask.sum())
    places = mask.nonzero()
    height, width = (places.amax(0) - places.amin(0) + 1).tolist()
    assert height * width - hidden < max(height, width)
    if math.ceil(math.sqrt(hidden)) <= min(rows, columns):
        assert abs(height - width) <= 1


def test_a_square_goes_anywhere() -> None:
    masks = square_mask(500, (6, 6), 0.25, generator())
    assert masks.any(dim=0).all()


def test_blocks_clump_more_than_random_cells() -> None:
    grid = (14, 14)
    random = average_distance(random_mask(30, grid, 0.4, generator()), 16)
    blocks = average_distance(block_mask(30, grid, 0.4, generator()), 16)
    square = average_distance(square_mask(30, grid, 0.4, generator()), 16)
    assert random < blocks < square


@pytest.mark.parametrize(
    ("draw", "digest"),
    [
        (random_mask, "3994cdf1c765bd22"),
        (square_mask, "c1a935782ce19ce2"),
        (block_mask, "1ee299f64a1e3603"),
    ],
)
def test_masks_are_those_of_earlier_versions(draw: MaskFunction, digest: str) -> None:
    found = hashlib.sha256()
    for rows, columns in itertools.product(range(1, 15, 2), range(1, 15, 3)):
        for ratio, batch in itertools.product((0.0, 0.1, 0.35, 0.6, 0.85, 1.0), (0, 1, 3)):
            masks = draw(batch, (rows, columns), ratio, generator(rows * columns))
            found.update(masks.numpy().tobytes())
    assert found.hexdigest()[:16] == digest


def test_recipes_choose_the_strategy_and_its_settings() -> None:
    def read(**values: object) -> MaskSettings:
        return parse(MaskSettings, values, "test")

    assert read().chosen == RandomMask()
    assert read(strategy="square").chosen == SquareMask()
    assert read(strategy="block").chosen == BlockMask()
    wide = read(strategy="block", block={"aspect": [0.1, 0.2]}).chosen
    assert wide == BlockMask(aspect=(0.1, 0.2))
    mask = draw_masks(wide, 20, (12, 12), 0.3, generator()).sum(1)
    assert mask.ne(0).sum(1).double().mean() > 9  # blocks wider than they are high
    for values, message in (
        ({"strategy": "round"}, "'random', 'square' or 'block', got 'round'"),
        ({"block": {}}, "block has the settings of the strategy block, and strategy is random"),
        ({"strategy": "block", "block": {"aspcet": [1, 2]}}, "block.aspcet: unknown key; did you"),
        ({"strategy": "block", "block": {"smallest": 0}}, "smallest is 0"),
        ({"strategy": "block", "block": {"aspect": [2, 1]}}, r"aspect is \[2"),
    ):
        with pytest.raises(RecipeError, match=message):
            read(**values)  # type: ignore[arg-type]
    assert "--block.aspect" in describe(MaskSettings)


def test_a_mask_generator_is_picklable() -> None:
    masks = MaskGenerator.from_settings(MaskSettings(cell=16, strategy="block"), (64, 96))
    mask = masks(generator(4))
    assert mask.shape == (4, 6)
    assert int(mask.sum()) == hidden_count((4, 6), 0.6)
    assert torch.equal(mask, pickle.loads(pickle.dumps(masks))(generator(4)))


def test_enlarged_masks_repeat_each_cell() -> None:
    mask = torch.tensor([[[True, False], [False, True], [True, True]]])
    finer = enlarge_mask(mask, 3)
    assert finer.shape == (1, 9, 6)
    assert torch.equal(finer[:, 1::3, 2::3], mask)
    assert int(finer.sum()) == 9 * int(mask.sum())


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: mask_grid((192, 192), 36), "choose a cell of 2, 3, 4, 6, 8, .* 192 pixels"),
        (lambda: mask_grid((7, 5), 2), "choose an image size that is a multiple of 2"),
        (lambda: mask_grid((64, 64), 0), "do not divide"),
        (lambda: random_mask(1, (6, 6), 1.5), "between 0 and 1"),
        (lambda: random_mask(1, (0, 6), 0.5), "at least 1"),
        (lambda: random_mask(-1, (6, 6), 0.5), "at least 0"),
        (lambda: MaskSettings(ratio=1.0), "ratio is 1.0"),
        (lambda: MaskSettings(cell=0), "cell is 0"),
        (lambda: MaskSettings(cell=32).grid((32, 32)), "hides all of the 1x1 mask cells"),
    ],
)
def test_errors_name_the_remedy(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


@settings(deadline=None)
@given(
    cell=st.integers(1, 40),
    patch=st.sampled_from([1, 2, 4, 7]),
    size=st.sampled_from([(32, 32), (64, 48), (28, 28), (7, 5), (4, 4)]),
    ratio=st.sampled_from([0.3, 0.6, 0.9, 0.999]),
)
def test_the_cells_ratios_and_images_that_errors_name_are_legal(
    cell: int, patch: int, size: Grid, ratio: float
) -> None:
    mask = MaskSettings(cell=cell, ratio=ratio)
    try:
        mask.grid(size, patch)
    except ValueError as error:
        remedy = str(error).partition("choose ")[2]
        cells = re.search(r"a cell of ([0-9, ]+) pixels", remedy)
        multiple = re.search(r"multiple of (\d+) pixels", remedy)
        lower = re.search(r"ratio of at most ([0-9.]+[0-9])", remedy)
        large = size if multiple is None else (40 * int(multiple[1]), 60 * int(multiple[1]))
        for side in cells[1].split(", ") if cells else [str(cell)] if multiple else []:
            assert replace(mask, cell=int(side)).grid(large, patch)
        if lower:
            assert replace(mask, ratio=float(lower[1])).grid(size, patch)
        assert cells or lower or "image size" in remedy


def test_a_single_mask_equals_that_of_a_batch() -> None:
    grid, ratio = (6, 6), 0.6
    for seed in range(20):
        alone = random_mask(1, grid, ratio, torch.Generator().manual_seed(seed))
        noise = torch.rand(36, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        hidden = noise.argsort(stable=True)[:22]
        assert alone.flatten().nonzero().flatten().tolist() == sorted(hidden.tolist())
