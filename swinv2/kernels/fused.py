"""Scaled cosine attention for compilers, which fuse all of it but the two products.

Its own backward needs only tensors saved in the precision of the values: one number per score, and
queries, keys and values as given. The float32 tensors that autograd would save instead would be the
largest part of the memory traffic of a compiled block.

A fused loop reads the mask several times: as an operator it is computed only once.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinv2.kernels.dispatch import is_compiling_kernels
from swinv2.kernels.precision import without_autocast
from swinv2.kernels.sequential import MIN_NORM


def fused_attention(qkv: Tensor, *, scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by scaled cosine similarity: `swinv2.attention.explicit_attention`, fused.

    Shapes are the same; the result can be differentiated once.
    """
    query, key, value = rearrange(
        qkv,
        "batch windows tokens (roles heads d) -> roles batch windows heads tokens d",
        roles=3,
        heads=len(scale),
    )
    with without_autocast(qkv.device):
        mixed: Tensor = _attend(query, key, value, scale, bias, mask)[0]
    return mixed.transpose(2, 3).flatten(3)


class _FusedAttention(torch.autograd.Function):
    """Attention of (batch, windows, heads, tokens, d).

    The exponentials are rounded to the precision of the values and saved before dividing by their
    sums (batch, windows, heads, tokens, 1): the smaller products are divided instead. Source of
    this and of the backward: FlashAttention, arXiv 2205.14135, section 3, appendix B.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # apply takes no keywords
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: Tensor,
        bias: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        norms = _inverse_norms(query, scale.dtype), _inverse_norms(key, scale.dtype)
        scores = _scaled(query, norms[0] * scale) @ _scaled(key, norms[1]).transpose(-2, -1)
        scores = scores + bias if mask is None else scores + bias + mask
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp().to(value.dtype)
        sums = exponentials.sum(-1, keepdim=True, dtype=scores.dtype)
        mixed = ((exponentials @ value) / sums).to(value.dtype)
        return mixed, exponentials, sums, *norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        query, key, value, scale, mixed, exponentials, sums, *norms = ctx.saved_tensors
        divided = (gradient / sums).to(value.dtype)
        for_value = exponentials.transpose(-2, -1) @ divided
        # Sum over keys of weight times gradient, equal to the sum over d of output times gradient.
        mean = (divided.to(sums.dtype) * mixed).sum(-1, keepdim=True)
        for_weights = divided @ value.transpose(-2, -1)
        for_scores = (exponentials * (for_weights - mean)).to(value.dtype)
        for_query, for_scale = _unscaled(
            for_scores @ _scaled(key, norms[1]), query, norms[0], scale
        )
        for_key, _unused = _unscaled(
            for_scores.transpose(-2, -1) @ _scaled(query, norms[0] * scale),
            key,
            norms[1],
            torch.ones_like(scale),
        )
        for_bias = for_scores.to(sums.dtype).sum((0, 1))
        return for_query, for_key, for_value, for_scale, for_bias, None


_attend: Any = _FusedAttention.apply


def _inverse_norms(vectors: Tensor, precise: torch.dtype) -> Tensor:
    """Return the inverse norms of (..., d), (..., 1)."""
    squares = vectors.to(precise).square()
    return squares.sum(-1, keepdim=True).clamp_min(MIN_NORM**2).rsqrt()


def _scaled(vectors: Tensor, factors: Tensor) -> Tensor:
    """Multiply in the precision of the factors, and round to the precision of the vectors."""
    return (vectors.to(factors.dtype) * factors).to(vectors.dtype)


def _unscaled(
    gradient: Tensor, vectors: Tensor, norms: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of vectors and scale, given the gradient of directions times scale.

    The component along a direction has no effect on it.
    """
    directions, gradient = vectors.to(scale.dtype) * norms, gradient.to(scale.dtype)
    along = (gradient * directions).sum(-1, keepdim=True)
    for_vectors = (gradient - directions * along) * (norms * scale)
    return for_vectors.to(vectors.dtype), along.sum((0, 1, 3))[..., None]


def region_mask(regions: Tensor, across: float, padding: int | None) -> Tensor:
    """Return the mask that is added to scores, (windows, 1, queries, keys), float32.

    Args:
        regions: (windows, tokens), int64.
        across: added between tokens of different regions.
        padding: the region that nothing may attend to; None if there is none.
    """
    if is_compiling_kernels():
        mask: Tensor = _region_mask_operator(regions, across, padding)
        return mask
    return _region_mask(regions, across, padding)


def _region_mask(regions: Tensor, across: float, padding: int | None) -> Tensor:
    queries, keys = regions[:, None, :, None], regions[:, None, None, :]
    mask = torch.where(queries == keys, 0.0, across)
    return mask if padding is None else mask.masked_fill(keys == padding, -math.inf)


_region_mask_operator = torch.library.custom_op(
    "swinv2::region_mask",
    _region_mask,
    mutates_args=(),
    schema="(Tensor regions, float across, int? padding) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


@_region_mask_operator.register_fake
def _(regions: Tensor, across: float, padding: int | None) -> Tensor:  # noqa: ARG001
    windows, tokens = regions.shape
    return regions.new_empty(windows, 1, tokens, tokens, dtype=torch.float32)
