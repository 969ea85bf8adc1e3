"""Sequential scaled cosine attention: one group of windows at a time, with its own backward.

Scores are the largest tensors of the encoder: (windows, heads, tokens, tokens). Here only those of
one group exist at a time, which fit into the processor's cache. For the backward the attention
weights are either saved, once and in the precision of the values, or computed again: then inputs of
any size take a fixed memory (paper, section 3.5, sequential self-attention).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinv2.compat import softmax_backward_in_place
from swinv2.kernels.dispatch import choose_scores_at_a_time, use_operators
from swinv2.kernels.precision import outside_autocast

MIN_NORM = 1e-12
"""Least norm that a query or key is divided by."""


class Group(NamedTuple):
    """Images, windows and heads whose scores are computed together."""

    images: slice
    windows: slice
    heads: slice


def sequential_attention(
    qkv: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    scores_at_a_time: int | None,
    save_weights: bool,
) -> Tensor:
    """Attend within windows: softmax(scale · cos(query, key) + bias + mask) · value.

    Args:
        qkv: (batch, windows, tokens, 3·heads·d): queries, keys and values in a row.
        scale: (heads, 1, 1), at least float32.
        bias: (heads, tokens, tokens), in the precision of scale.
        mask: (windows, 1, tokens, tokens), added to the scores of each window, or None.
        scores_at_a_time: scores of a group, which has at least one window and head; None for
            `swinv2.kernels.dispatch.choose_scores_at_a_time`.
        save_weights: save the attention weights for the backward, in the precision of qkv, instead
            of computing them again.

    Returns:
        (batch, windows, tokens, heads·d), which can be differentiated once.
    """
    save_weights = save_weights and torch.is_grad_enabled()
    run = _attend if use_operators() else _apply
    mixed: Tensor = run(qkv, scale, bias, mask, scores_at_a_time, save_weights)[0]
    return mixed


@outside_autocast
def attend(  # noqa: PLR0917  # an operator takes no keywords
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    scores_at_a_time: int | None,
    save_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output of `sequential_attention`, and the saved weights, empty if none are."""
    roles = _by_head(qkv, 3, len(scale))
    mixed = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    saved = qkv.new_empty(_num_weights(roles) if save_weights else 0)
    (mixed_by_head,) = _by_head(mixed, 1, len(scale))
    position = 0
    for group in _groups(roles, scores_at_a_time):
        directions, _ = _directions(roles[:2][_of_both(group)], scale[group.heads])
        value = roles[2][group].contiguous()
        weights = _weights(directions.to(value.dtype), _bias_and_mask(bias, mask, group))
        if save_weights:
            weights = (
                saved[position : position + weights.numel()].view(weights.shape).copy_(weights)
            )
            position += weights.numel()
        mixed_by_head[group] = _product(weights.to(value.dtype), value)
    return mixed, saved


@outside_autocast
def attend_backward(  # noqa: PLR0917
    gradient: Tensor,
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    scores_at_a_time: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, scale and bias."""
    roles = _by_head(qkv, 3, len(scale))
    (gradient_by_head,) = _by_head(gradient, 1, len(scale))
    for_qkv, for_bias = qkv.new_empty(qkv.shape), bias.new_zeros(bias.shape)
    for_scale = scale.new_zeros(scale.shape)
    for_roles = _by_head(for_qkv, 3, len(scale))
    position = 0
    for group in _groups(roles, scores_at_a_time):
        scale_of_group = scale[group.heads]
        precise, factors = _directions(roles[:2][_of_both(group)], scale_of_group)
        value = roles[2][group].contiguous()
        directions = precise.to(value.dtype)
        if len(saved):
            shape = (*value.shape[:-1], value.shape[-2])
            rounded = saved[position : position + math.prod(shape)].view(shape)
            position += rounded.numel()
            weights = rounded.to(scale.dtype)
        else:
            weights = _weights(directions, _bias_and_mask(bias, mask, group))
            rounded = weights.to(value.dtype)
        outcome = gradient_by_head[group].contiguous()
        for_roles[2][group] = _product(rounded.transpose(-2, -1), outcome)

        for_scores = _product(outcome, value.transpose(-2, -1)).to(scale.dtype)
        softmax_backward_in_place(for_scores, weights)
        for_bias[group.heads] += for_scores.sum((0, 1))

        # Backward of the normalisation: the component along the direction has no effect.
        for_directions = _for_directions(for_scores.to(value.dtype), directions).to(scale.dtype)
        along = _sum_of_rows(for_directions * precise)
        for_scale[group.heads] += along[0].sum((0, 1, 3), keepdim=True)[0, 0] / scale_of_group
        along[0] /= scale_of_group.square()
        for_directions.addcmul_(precise, along, value=-1)
        for_roles[:2][_of_both(group)] = for_directions.mul_(factors)
    return for_qkv, for_scale, for_bias


_attend = torch.library.custom_op(
    "swinv2::sequential_attention",
    attend,
    mutates_args=(),
    schema="(Tensor qkv, Tensor scale, Tensor bias, Tensor? mask, int? scores_at_a_time, "
    "bool save_weights) -> (Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)
_attend_backward = torch.library.custom_op(
    "swinv2::sequential_attention_backward",
    attend_backward,
    mutates_args=(),
    schema="(Tensor gradient, Tensor qkv, Tensor scale, Tensor bias, Tensor? mask, Tensor saved, "
    "int? scores_at_a_time) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)


@_attend.register_fake
def _(  # noqa: PLR0917
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    scores_at_a_time: int | None,  # noqa: ARG001
    save_weights: bool,
) -> tuple[Tensor, Tensor]:
    mixed = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    return mixed, qkv.new_empty(_num_weights(_by_head(qkv, 3, len(scale))) if save_weights else 0)


@_attend_backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    *rest: object,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), scale.new_empty(scale.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scores_at_a_time, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, gradient, _attend_backward)


def _gradients(
    ctx: Any, gradient: Tensor, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor | None, ...]:
    gradients = backward(gradient, *ctx.saved_tensors, ctx.scores_at_a_time)
    return (*gradients, None, None, None)


_attend.register_autograd(_backward, setup_context=_save)


class _SequentialAttention(torch.autograd.Function):
    """The operators without the dispatcher, which costs time eagerly."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = attend(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradient, attend_backward)


_apply: Any = _SequentialAttention.apply


def _num_weights(roles: Tensor) -> int:
    """Return the number of attention weights: one per query and key."""
    _, batch, windows, heads, tokens, _ = roles.shape
    return batch * windows * heads * tokens**2


def _by_head(tensor: Tensor, roles: int, heads: int) -> Tensor:
    """View (batch, windows, tokens, roles·heads·d) as (roles, batch, windows, heads, tokens, d)."""
    return rearrange(
        tensor,
        "batch windows tokens (roles heads d) -> roles batch windows heads tokens d",
        roles=roles,
        heads=heads,
    )


def _groups(roles: Tensor, scores_at_a_time: int | None) -> Iterator[Group]:
    """Split (roles, batch, windows, heads, tokens, d) along images, windows and heads.

    A group has one window of many images rather than many windows of one image, so that bias plus
    mask is computed once for all of them.
    """
    _, batch, windows, heads, tokens, _ = roles.shape
    if scores_at_a_time is None:
        scores_at_a_time = choose_scores_at_a_time(tokens, on_cpu=roles.is_cpu)
    heads_at_a_time = max(1, scores_at_a_time // tokens**2)
    images_at_a_time = min(batch, max(1, heads_at_a_time // heads))
    windows_at_a_time = max(1, heads_at_a_time // (heads * images_at_a_time))
    for several in _slices(windows, windows_at_a_time):
        for some in _slices(heads, heads_at_a_time):
            for images in _slices(batch, images_at_a_time):
                yield Group(images, several, some)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _of_both(group: Group) -> tuple[slice, ...]:
    """Index queries and keys together."""
    return (slice(None), *group)


def _directions(vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys, (2, ..., heads, tokens, d), and scale the queries.

    Return the result, contiguous and in the precision of scale, and the factors applied,
    (2, ..., heads, tokens, 1).
    """
    directions = vectors.to(scale.dtype, memory_format=torch.contiguous_format, copy=True)
    factors = _sum_of_rows(directions.square()).clamp_min_(MIN_NORM**2).rsqrt_()
    factors[0] *= scale
    return directions.mul_(factors), factors


def _sum_of_rows(vectors: Tensor) -> Tensor:
    """Sum (..., d) to (..., 1); on a CPU a product with ones is faster for rows this short."""
    if not vectors.is_cpu:
        return vectors.sum(-1, keepdim=True)
    ones = vectors.new_ones(vectors.shape[-1])
    return torch.mv(vectors.flatten(0, -2), ones).view(*vectors.shape[:-1], 1)


def _bias_and_mask(bias: Tensor, mask: Tensor | None, group: Group) -> Tensor:
    """Return bias plus mask of a group, the same for every image."""
    return bias[group.heads] if mask is None else bias[group.heads] + mask[group.windows]


def _weights(directions: Tensor, added: Tensor) -> Tensor:
    """Return the attention weights (images, windows, heads, queries, keys)."""
    query, key = directions
    scores = _product(query, key.transpose(-2, -1)).to(added.dtype)
    scores += added
    return torch.softmax(scores, dim=-1, out=scores)


def _for_directions(for_scores: Tensor, directions: Tensor) -> Tensor:
    """Return the gradients of queries and keys, stacked as these are."""
    (query, key), for_scores = directions.flatten(1, 3), for_scores.flatten(0, 2)
    gradients = torch.empty_like(directions)
    torch.bmm(for_scores, key, out=gradients[0].flatten(0, 2))
    torch.bmm(for_scores.transpose(-2, -1), query, out=gradients[1].flatten(0, 2))
    return gradients


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of (images, windows, heads, ...).

    With a transposed factor in five dimensions `@` would copy it first.
    """
    return torch.bmm(left.flatten(0, 2), right.flatten(0, 2)).view(
        *left.shape[:-1], right.shape[-1]
    )
