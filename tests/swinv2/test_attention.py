import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swinv2.attention import (
    WindowAttention,
    explicit_attention,
    partition,
    reverse,
    shift_tokens,
    unshift_tokens,
    window_grid,
    window_mask,
    window_regions,
    windows_by_mask,
)
from swinv2.kernels.sequential import sequential_attention
from swinv2.position_bias import PositionBias, relative_coordinates, relative_position_index

CPU = torch.device("cpu")
sides = st.integers(1, 20)


@settings(deadline=None, max_examples=60)
@given(rows=sides, columns=sides, height=sides, width=sides, shifted=st.booleans())
def test_partition_then_reverse_is_the_identity(
    rows: int, columns: int, height: int, width: int, shifted: bool
) -> None:
    grid = window_grid((rows, columns), (height, width), shifted=shifted)
    tokens = torch.arange(2 * rows * columns * 6).reshape(2, rows, columns, 6)
    windows = partition(shift_tokens(tokens, grid), grid)
    assert windows.shape == (2, math.prod(grid.windows), math.prod(grid.window), 6)
    assert torch.equal(unshift_tokens(reverse(windows, grid), grid), tokens)


@settings(deadline=None, max_examples=60)
@given(rows=sides, columns=sides, height=sides, width=sides, shifted=st.booleans())
def test_the_mask_separates_regions(
    rows: int, columns: int, height: int, width: int, shifted: bool
) -> None:
    grid = window_grid((rows, columns), (height, width), shifted=shifted)
    mask = window_mask(grid, CPU)[:, 0]
    numbers = torch.arange(1, rows * columns + 1).reshape(1, rows, columns, 1)
    names = partition(shift_tokens(numbers, grid), grid)[0, :, :, 0]
    seen = {
        (query, key)
        for window, allowed in zip(names.tolist(), (mask == 0).tolist(), strict=True)
        for query, row in zip(window, allowed, strict=True)
        for key, is_allowed in zip(window, row, strict=True)
        if is_allowed and query
    }

    def stretch(position: int, axis: int) -> int:
        return (position - grid.shift[axis]) // grid.window[axis]

    places = list(itertools.product(range(rows), range(columns)))
    expected = {
        (1 + columns * places[a][0] + places[a][1], 1 + columns * places[b][0] + places[b][1])
        for a, b in itertools.product(range(len(places)), repeat=2)
        if all(stretch(places[a][i], i) == stretch(places[b][i], i) for i in (0, 1))
    }
    assert seen == expected
    padded = (names == 0)[:, None, :].expand_as(mask)
    assert mask[padded].isneginf().all()
    assert set(mask[~padded].tolist()) <= {0.0, -100.0}


@settings(deadline=None, max_examples=60)
@given(rows=sides, columns=sides, height=sides, width=sides, shifted=st.booleans())
def test_windows_of_a_group_have_the_same_mask(
    rows: int, columns: int, height: int, width: int, shifted: bool
) -> None:
    grid = window_grid((rows, columns), (height, width), shifted=shifted)
    mask = window_mask(grid, CPU)[:, 0]
    numbers = torch.arange(len(mask)).view(grid.windows)
    groups = windows_by_mask(grid)
    for places, first, masked in groups:
        members = numbers[places].flatten()
        assert int(members[0]) == first
        assert all(torch.equal(mask[number], mask[first]) for number in members)
        assert masked or not mask[first].any()
    covered = torch.cat([numbers[group.places].flatten() for group in groups])
    assert covered.sort().values.tolist() == list(range(len(mask)))
    if not any(grid.padding):
        assert len(groups) <= 4


@pytest.mark.parametrize(
    ("resolution", "window", "shifted"),
    [
        ((12, 12), (4, 4), True),  # the plain case
        ((9, 13), (4, 4), False),  # padding
        ((9, 13), (4, 4), True),  # padding before the shift; two windows hold padded rows
        ((5, 11), (8, 4), True),  # one axis clamped and unshifted, the other shifted
        ((7, 9), (3, 5), True),  # windows that are not square, odd shifts
        ((5, 6), (1, 1), True),
        ((1, 3), (2, 2), True),
    ],
)
@pytest.mark.parametrize("reference", [(12, 12), (3, 6), (1, 1)])
def test_attention_equals_a_softmax_per_query(
    resolution: tuple[int, int],
    window: tuple[int, int],
    shifted: bool,
    reference: tuple[int, int],
    randomise: Callable[[nn.Module], None],
    attend_by_hand: Callable[..., Tensor],
) -> None:
    attention = WindowAttention(12, 3, reference).double()
    randomise(attention)
    tokens = torch.randn(2, *resolution, 12, dtype=torch.float64)
    output = attention(tokens, window_grid(resolution, window, shifted=shifted))
    for tokens_of_one, output_of_one in zip(tokens, output, strict=True):
        expected = attend_by_hand(
            attention, tokens_of_one, window=window, shifted=shifted, reference=reference
        )
        torch.testing.assert_close(output_of_one, expected, rtol=1e-10, atol=1e-10)


def test_the_logit_scale_is_clamped_at_100() -> None:
    attention = WindowAttention(8, 2, (4, 4)).double()
    grid = window_grid((4, 4), (4, 4), shifted=False)
    tokens = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    outputs = []
    for scale in (100, 1e6):
        nn.init.constant_(attention.logit_scale, math.log(scale))
        outputs.append(attention(tokens, grid))
    assert torch.equal(*outputs)


def join(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Lay (heads, tokens, d) each as a window of one image, (1, 1, tokens, 3·heads·d)."""
    return torch.stack((query, key, value)).permute(2, 0, 1, 3).flatten(1)[None, None]


def test_scores_do_not_depend_on_norms_of_queries_and_keys() -> None:
    query, key, value = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    rest: dict[str, Tensor | None] = {
        "scale": torch.full((2, 1, 1), 10.0, dtype=torch.float64),
        "bias": torch.zeros(2, 5, 5, dtype=torch.float64),
        "mask": None,
    }
    expected = explicit_attention(join(query, key, value), **rest)
    torch.testing.assert_close(
        explicit_attention(join(7 * query, 0.1 * key, value), **rest), expected
    )


@pytest.mark.parametrize(
    "attend",
    [
        explicit_attention,
        partial(sequential_attention, scores_at_a_time=1, save_weights=False),
        partial(sequential_attention, scores_at_a_time=None, save_weights=True),
    ],
)
def test_a_zero_query_attends_evenly_and_has_finite_gradients(
    attend: Callable[..., Tensor],
) -> None:
    query = torch.zeros(1, 3, 4, requires_grad=True)
    key, value = torch.randn(2, 1, 3, 4)
    mixed = attend(
        join(query, key, value), scale=torch.ones(1, 1, 1), bias=torch.zeros(1, 3, 3), mask=None
    )
    torch.testing.assert_close(mixed[0, 0], value.mean(-2).expand(3, 4))
    mixed.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_relative_coordinates_end_at_the_border_of_the_pretraining_window() -> None:
    edge = math.log2(9) / 3
    same = relative_coordinates((8, 8), (8, 8), torch.float64, CPU)
    assert same.shape == (15 * 15, 2)
    torch.testing.assert_close(same[0], torch.tensor([-edge, -edge], dtype=torch.float64))
    torch.testing.assert_close(same[15 * 7 + 7], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(same, -same.flip(0))
    transferred = relative_coordinates((16, 4), (8, 8), torch.float64, CPU)
    assert transferred.shape == (31 * 7, 2)
    assert transferred[-1, 0] == pytest.approx(math.log2(8 * 15 / 7 + 1) / 3)
    assert transferred[-1, 1] == pytest.approx(math.log2(8 * 3 / 7 + 1) / 3)


def test_position_bias_depends_only_on_the_offset() -> None:
    bias = PositionBias(3, (4, 4)).double()
    table = bias((3, 5))
    assert table.shape == (3, 15, 15)
    assert ((table > 0) & (table < 16)).all()
    index = relative_position_index((3, 5), CPU)
    assert index.unique().tolist() == list(range(5 * 9))
    for query, key in itertools.product(range(15), repeat=2):
        offset = (query // 5 - key // 5, query % 5 - key % 5)
        assert index[query, key] == (offset[0] + 2) * 9 + offset[1] + 4


def test_tables_cached_in_inference_mode_work_in_training() -> None:
    attention = WindowAttention(8, 2, (4, 4))
    grid = window_grid((19, 23), (5, 3), shifted=True)
    tokens = torch.randn(1, 19, 23, 8)
    with torch.inference_mode():
        attention(tokens, grid)
    attention(tokens, grid).sum().backward()


def test_under_autocast_only_the_products_are_rounded(
    randomise: Callable[[nn.Module], None],
) -> None:
    attention = WindowAttention(32, 4, (4, 4))
    randomise(attention)
    grid = window_grid((10, 10), (4, 4), shifted=True)
    tokens = torch.randn(2, 10, 10, 32)
    exact = attention(tokens, grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = attention(tokens, grid)
        assert attention.position_bias((4, 4)).dtype == torch.float32
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("tokens_of_window", [16, 9])
def test_sdpa_shares_one_mask_among_images_and_windows(
    tokens_of_window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    attend = F.scaled_dot_product_attention

    def noted(*args: Tensor, attn_mask: Tensor, **rest: float) -> Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    attention = WindowAttention(8, 2, (4, 4))
    attention.path = "sdpa"
    side = math.isqrt(tokens_of_window)
    attention(torch.randn(3, 13, 19, 8), window_grid((13, 19), (side, side), shifted=True))
    assert len(masks) > 1
    for mask in masks:
        assert mask.stride(0) == 0
        assert mask.stride(2) % 16 == 0  # aligned rows, which the kernels would copy otherwise


def test_gradients_are_reproducible_bit_for_bit() -> None:
    attention = WindowAttention(16, 2, (6, 6))
    tokens = torch.randn(3, 13, 13, 16)
    grid = window_grid((13, 13), (6, 6), shifted=True)
    gradients = []
    for _ in range(2):
        attention.zero_grad()
        attention(tokens, grid).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in attention.parameters()])
    assert all(torch.equal(first, again) for first, again in zip(*gradients, strict=True))


def test_tables_are_cached_except_in_a_trace() -> None:
    attention = WindowAttention(8, 2, (4, 4)).eval()
    grid = window_grid((9, 7), (4, 3), shifted=True)
    tokens = torch.randn(1, 9, 7, 8)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, tokens: Tensor) -> Tensor:
            return self.attention(tokens, grid)

    traced = torch.export.export(Fixed(), (tokens,)).module()
    assert window_regions(grid, CPU) is window_regions(grid, CPU)
    assert type(window_regions(grid, CPU)) is Tensor
    torch.testing.assert_close(traced(tokens), attention(tokens, grid))
