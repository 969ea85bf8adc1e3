"""From the offsets of a window to its pairs of tokens and back, as operators.

Of a bias that is given by offset, each offset is read by many pairs, so the gradient of one is a
sum over pairs. PyTorch adds these one by one, on one thread: in windows of 24 x 24 that took a
quarter of a bfloat16 training step of one image. Offsets along an axis are differences of places,
so that the keys of one query lie in a row of them, and sums are those of whole rows.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "swinv2::spread_offsets",
    mutates_args=(),
    schema="(Tensor table, Tensor index, int[] window) -> Tensor",
    tags=torch.Tag.flexible_layout,
)
def spread_offsets(table: Tensor, index: Tensor, window: list[int]) -> Tensor:  # noqa: ARG001
    """Give each pair of tokens the row of its offset: (heads, queries, keys).

    Args:
        table: (offsets, heads), offsets along the last axis vary fastest.
        index: (queries, keys), int64: the row of each pair, as `swinv2.position_bias.offset_index`
            gives it for the window.
        window: tokens along each axis.

    Returns:
        It can be differentiated once.
    """
    rows = table.t().contiguous().index_select(1, index.flatten())
    return rows.view(-1, *index.shape)


@torch.library.custom_op(
    "swinv2::sum_by_offset",
    mutates_args=(),
    schema="(Tensor by_pair, int[] window) -> Tensor",
    tags=torch.Tag.flexible_layout,
)
def sum_by_offset(by_pair: Tensor, window: list[int]) -> Tensor:
    """Sum (heads, queries, keys) over the pairs of each offset: (offsets, heads).

    The order of the sums is fixed by the window.
    """
    axes = len(window)
    sums = by_pair.view(-1, *window, *window)
    for axis, side in enumerate(window):
        # Sums of the axes before are behind the keys, and go there for this one, too.
        by_query = sums.movedim((1, 1 + axes - axis), (0, -1))
        sums = by_query.new_zeros(*by_query.shape[1:-1], 2 * side - 1)
        for query in range(side):
            first = side - 1 - query  # the offset of key 0, counted from that of the last query
            sums[..., first : first + side].add_(by_query[query])
    # So far they are key minus query.
    return sums.flip(tuple(range(1, 1 + axes))).flatten(1).t().contiguous()


@spread_offsets.register_fake
def _(table: Tensor, index: Tensor, window: list[int]) -> Tensor:  # noqa: ARG001
    return table.new_empty(table.shape[1], *index.shape)


@sum_by_offset.register_fake
def _(by_pair: Tensor, window: list[int]) -> Tensor:
    offsets = 1
    for side in window:
        offsets *= 2 * side - 1
    return by_pair.new_empty(offsets, by_pair.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, _, ctx.window = inputs


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return sum_by_offset(gradient.contiguous(), ctx.window), None, None


spread_offsets.register_autograd(_differentiate, setup_context=_keep)
