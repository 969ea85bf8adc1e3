"""A bias spread from offsets to pairs of tokens, and its gradient, equal indexing and its own."""

import math

import pytest
import torch

from swinv2.kernels.relative_position_ops import spread_offsets, sum_by_offset
from swinv2.position_bias import offset_index

HEADS = 3
WINDOWS = [(1, 1), (1, 4), (3, 2), (6, 6), (4, 3, 2), (1, 5, 1), (5,)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_it_equals_indexing(window: tuple[int, ...]) -> None:
    index = offset_index(window, torch.device("cpu"))
    offsets = math.prod(2 * side - 1 for side in window)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(offsets, HEADS, generator=generator, dtype=torch.float64)
    by_pair = torch.randn(HEADS, *index.shape, generator=generator, dtype=torch.float64)
    table.requires_grad_()
    spread, indexed = spread_offsets(table, index, window), table[index].permute(2, 0, 1)
    assert torch.equal(spread, indexed)
    (found,) = torch.autograd.grad(spread, table, by_pair)
    (expected,) = torch.autograd.grad(indexed, table, by_pair)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_any_layout_are_taken_and_repeat() -> None:
    window = (3, 2)
    index = offset_index(window, torch.device("cpu"))
    table = torch.randn(5 * 3, HEADS, requires_grad=True)
    turned = torch.randn(HEADS, *index.shape).transpose(1, 2)
    results = [
        torch.autograd.grad(spread_offsets(table, index, window), table, gradient)[0]
        for gradient in (turned, turned.contiguous(), turned)
    ]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_they_are_operators_that_compilers_know() -> None:
    index = offset_index((3, 2), torch.device("cpu"))
    table = torch.randn(5 * 3, HEADS, requires_grad=True)
    torch.library.opcheck(spread_offsets, (table, index, [3, 2]))
    torch.library.opcheck(sum_by_offset, (torch.randn(HEADS, *index.shape), [3, 2]))
