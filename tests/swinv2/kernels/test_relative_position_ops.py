"""Gathering by relative position, and its gradient, equal plain indexing."""

import math

import pytest
import torch

from swinv2.kernels.relative_position_ops import gather_relative_positions, sum_relative_positions
from swinv2.position_bias import relative_position_index

HEADS = 3
WINDOWS = [(1, 1), (1, 4), (3, 2), (6, 6), (4, 3, 2), (1, 5, 1), (5,)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_it_equals_indexing(window: tuple[int, ...]) -> None:
    index = relative_position_index(window, torch.device("cpu"))
    offsets = math.prod(2 * side - 1 for side in window)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(offsets, HEADS, generator=generator, dtype=torch.float64)
    by_pair = torch.randn(HEADS, *index.shape, generator=generator, dtype=torch.float64)
    table.requires_grad_()
    gathered, indexed = (
        gather_relative_positions(table, index, window),
        table[index].permute(2, 0, 1),
    )
    assert torch.equal(gathered, indexed)
    (found,) = torch.autograd.grad(gathered, table, by_pair)
    (expected,) = torch.autograd.grad(indexed, table, by_pair)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_any_layout_are_reproducible() -> None:
    window = (3, 2)
    index = relative_position_index(window, torch.device("cpu"))
    table = torch.randn(5 * 3, HEADS, requires_grad=True)
    turned = torch.randn(HEADS, *index.shape).transpose(1, 2)
    results = [
        torch.autograd.grad(gather_relative_positions(table, index, window), table, gradient)[0]
        for gradient in (turned, turned.contiguous(), turned)
    ]
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised by opcheck itself
def test_compilers_accept_the_operators() -> None:
    index = relative_position_index((3, 2), torch.device("cpu"))
    table = torch.randn(5 * 3, HEADS, requires_grad=True)
    torch.library.opcheck(torch.ops.swinv2.gather_relative_positions, (table, index, [3, 2]))
    torch.library.opcheck(sum_relative_positions, (torch.randn(HEADS, *index.shape), [3, 2]))
