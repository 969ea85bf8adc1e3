"""Gather by relative position and its gradient, as operators.

A position bias is a table by relative position (offset), and many pairs of tokens of a window share
one. The gradient of a row is therefore a sum over pairs, which PyTorch computes pair by pair on one
thread: in windows of 24 x 24 that took a quarter of a bfloat16 training step of one image. Along an
axis, offsets are differences of places: with the queries of each key moved by the key's place, the
pairs of an offset are a column, and one sum adds them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2.kernels.dispatch import is_exporting


def gather_relative_positions(table: Tensor, index: Tensor, window: tuple[int, ...]) -> Tensor:
    """Return the row of the table for each pair of tokens: (heads, queries, keys).

    Args:
        table: (offsets, heads); offsets along the last axis vary fastest.
        index: (queries, keys), int32 or int64: the row of each pair, as
            `swinv2.position_bias.relative_position_index` gives it for the window.
        window: tokens along each axis.

    Returns:
        A tensor that can be differentiated once.
    """
    if is_exporting():
        return F.embedding(index, table).permute(2, 0, 1)
    gathered: Tensor = _gather(table, index, window)
    return gathered


@torch.library.custom_op(
    "swinv2::gather_relative_positions",
    mutates_args=(),
    schema="(Tensor table, Tensor index, int[] window) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def _gather(table: Tensor, index: Tensor, window: list[int]) -> Tensor:  # noqa: ARG001
    rows = table.t().contiguous().index_select(1, index.flatten())
    return rows.view(-1, *index.shape)


@torch.library.custom_op(
    "swinv2::sum_relative_positions",
    mutates_args=(),
    schema="(Tensor by_pair, int[] window) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def sum_relative_positions(by_pair: Tensor, window: list[int]) -> Tensor:
    """Sum (heads, queries, keys) over the pairs of each relative position: (offsets, heads).

    The order of the sums is fixed by the window.
    """
    axes = len(window)
    sums = by_pair.view(-1, *window, *window)
    for axis, side in enumerate(window):
        # Axes: heads, offsets so far; queries and keys of this axis; queries, keys of later ones.
        queries, keys = 1 + axis, 1 + axes
        sums = _sum_diagonals(sums.movedim((keys, queries), (queries, queries + 1)), queries, side)
    return sums.flatten(1).t().contiguous()


def _sum_diagonals(pairs: Tensor, axis: int, side: int) -> Tensor:
    """Sum (..., keys, queries, ...) over the pairs of each offset query - key: (..., offsets, ...).

    Rows of `side` places, written 2·side - 2 places apart and read 2·side - 1 apart, begin one
    place earlier from key to key, so that each offset is a column.

    Args:
        pairs: any layout.
        axis: axis of the keys; that of the queries is the next.
        side: length of both.
    """
    offsets = 2 * side - 1
    rows = pairs.new_zeros(*pairs.shape[: axis + 1], offsets, *pairs.shape[axis + 2 :])
    strides = list(rows.stride())
    place = strides[axis + 1]
    strides[axis] = (offsets - 1) * place
    rows.as_strided(pairs.shape, strides, (side - 1) * place).copy_(pairs)
    return rows.sum(axis)


@_gather.register_fake
def _(table: Tensor, index: Tensor, window: list[int]) -> Tensor:  # noqa: ARG001
    return table.new_empty(table.shape[1], *index.shape)


@sum_relative_positions.register_fake
def _(by_pair: Tensor, window: list[int]) -> Tensor:
    offsets = 1
    for side in window:
        offsets *= 2 * side - 1
    return by_pair.new_empty(offsets, by_pair.shape[0])


def _save_window(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, _, ctx.window = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return sum_relative_positions(gradient.contiguous(), ctx.window), None, None


_gather.register_autograd(_backward, setup_context=_save_window)
