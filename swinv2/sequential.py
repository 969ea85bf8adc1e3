"""Scaled cosine attention, one group of windows after the other, with a backward of its own.

Scores are the largest tensors of the encoder: (windows, heads, tokens, tokens). Here only those of
one group exist at a time, in the forward pass and in the backward, which computes them again. A
small group stays in the processor's cache, which is faster than writing scores and reading them;
and inputs of any size take a fixed memory (paper, section 3.5, sequential self-attention).
"""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST = 1e-12
"""What a query or key is divided by where it is shorter than this."""

Group = tuple[slice, slice, slice]


def sequential_attention(
    qkv: Tensor, *, scale: Tensor, bias: Tensor, mask: Tensor | None, scores_at_a_time: int
) -> Tensor:
    """Attend within windows: softmax(scale · cos(query, key) + bias + mask) · value.

    Args:
        qkv: (batch, windows, tokens, 3·heads·d): queries, keys and values in a row.
        scale: (heads, 1, 1), at least float32.
        bias: (heads, tokens, tokens), in the precision of scale.
        mask: (windows, 1, tokens, tokens), added to the scores of each window, or None.
        scores_at_a_time: numbers in the scores of a group, which has one window and head at least.

    Returns:
        (batch, windows, tokens, heads·d). It can be differentiated once.
    """
    mixed: Tensor = _SequentialAttention.apply(  # type: ignore[no-untyped-call]
        qkv, scale, bias, mask, scores_at_a_time
    )
    return mixed


class _SequentialAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  # apply takes no keywords
        ctx: Any,
        qkv: Tensor,
        scale: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        scores_at_a_time: int,
    ) -> Tensor:
        ctx.scores_at_a_time = scores_at_a_time
        roles = _by_head(qkv, 3, len(scale))
        mixed = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
        (mixed_by_head,) = _by_head(mixed, 1, len(scale))
        for group in _groups(roles.shape[1:], scores_at_a_time):
            directions, _ = _directions(roles[:2][_of_both(group)], scale[group[2]])
            weights = _weights(directions, bias, mask, group)
            value = roles[2][group].contiguous()
            mixed_by_head[group] = _product(weights.to(value.dtype), value)
        ctx.save_for_backward(qkv, mixed, scale, bias, mask)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, mixed, scale, bias, mask = ctx.saved_tensors
        heads = len(scale)
        roles = _by_head(qkv, 3, heads)
        (mixed_by_head,), (gradient_by_head,) = (
            _by_head(tensor, 1, heads) for tensor in (mixed, gradient)
        )
        for_qkv, for_bias = torch.empty_like(qkv), torch.zeros_like(bias)
        for_scale = torch.zeros_like(scale)
        for_roles = _by_head(for_qkv, 3, heads)
        for group in _groups(roles.shape[1:], ctx.scores_at_a_time):
            scale_of_group = scale[group[2]]
            directions, factors = _directions(roles[:2][_of_both(group)], scale_of_group)
            query, key = directions
            weights = _weights(directions, bias, mask, group)
            outcome = gradient_by_head[group].contiguous()
            value = roles[2][group].contiguous()
            for_roles[2][group] = _product(weights.to(value.dtype).transpose(-2, -1), outcome)

            # The backward of softmax: what a row of it yields is already summed in `mixed`.
            yielded = (outcome.to(scale.dtype) * mixed_by_head[group]).sum(-1, keepdim=True)
            for_scores = _product(outcome, value.transpose(-2, -1)).to(scale.dtype)
            for_scores.sub_(yielded).mul_(weights)
            for_bias[group[2]] += for_scores.sum((0, 1))

            # The backward of a normalisation: what lies along the direction has no effect.
            for_scores = for_scores.to(value.dtype)
            for_directions = torch.stack(
                (_product(for_scores, key), _product(for_scores.transpose(-2, -1), query))
            ).to(scale.dtype)
            along = (for_directions * directions).sum(-1, keepdim=True)
            for_scale[group[2]] += along[0].sum((0, 1, 3), keepdim=True)[0, 0] / scale_of_group
            along[0] /= scale_of_group.square()
            for_directions -= directions * along
            for_roles[:2][_of_both(group)] = for_directions.mul_(factors)
        return for_qkv, for_scale, for_bias, None, None


def _by_head(tensor: Tensor, roles: int, heads: int) -> Tensor:
    """View (batch, windows, tokens, roles·heads·d) as (roles, batch, windows, heads, tokens, d)."""
    return rearrange(
        tensor,
        "batch windows tokens (roles heads d) -> roles batch windows heads tokens d",
        roles=roles,
        heads=heads,
    )


def _groups(shape: torch.Size, scores_at_a_time: int) -> Iterator[Group]:
    """Cut (batch, windows, heads, tokens, d) along its first axes, as late as possible."""
    batch, windows, heads, tokens = shape[:4]
    heads_at_a_time = max(1, scores_at_a_time // tokens**2)
    windows_at_a_time = max(1, heads_at_a_time // heads)
    images_at_a_time = max(1, windows_at_a_time // windows)
    for images in _slices(batch, images_at_a_time):
        for several in _slices(windows, windows_at_a_time):
            for some in _slices(heads, heads_at_a_time):
                yield images, several, some


def _of_both(group: Group) -> tuple[slice, ...]:
    """Index queries and keys together."""
    return (slice(None), *group)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _directions(vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys, (2, ..., heads, tokens, d), and scale the queries.

    Returns the result, contiguous, and the factors (2, ..., heads, tokens, 1) that led to it.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=scale.dtype)
    factors = length.clamp_min_(SHORTEST).reciprocal_()
    factors[0] *= scale
    directions = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
    return torch.mul(vectors, factors, out=directions), factors


def _weights(directions: Tensor, bias: Tensor, mask: Tensor | None, group: Group) -> Tensor:
    """Give the attention of each query to each key, (images, windows, heads, queries, keys)."""
    query, key = directions
    scores = _product(query, key.transpose(-2, -1)).to(bias.dtype)
    scores += bias[group[2]]
    if mask is not None:
        scores += mask[group[1]]
    return torch.softmax(scores, dim=-1, out=scores)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices, (images, windows, heads, ...) each.

    Of a transposed factor in five dimensions `@` makes a copy before it comes to the same.
    """
    return torch.bmm(left.flatten(0, 2), right.flatten(0, 2)).view(
        *left.shape[:-1], right.shape[-1]
    )
