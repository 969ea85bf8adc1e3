"""Scaled cosine attention for compilers, which fuse all of it but the two products.

It has a backward of its own, which reads no more than what is kept in the precision of the values:
one number for each score, and queries, keys and values as they came. What autograd would keep of
them in float32 is the largest part of what a compiled block reads and writes.

The mask is read several times in one fused loop: as an operator it is computed once instead.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinv2.kernels.sequential import SHORTEST


def fused_attention(qkv: Tensor, *, scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by scaled cosine similarity, as `swinv2.attention.explicit_attention` does.

    Shapes are the same; it can be differentiated once.
    """
    query, key, value = rearrange(
        qkv,
        "batch windows tokens (roles heads d) -> roles batch windows heads tokens d",
        roles=3,
        heads=len(scale),
    )
    mixed: Tensor = _attend(query, key, value, scale, bias, mask)[0]
    return mixed.transpose(2, 3).flatten(3)


class _Attention(torch.autograd.Function):
    """Attention of (batch, windows, heads, tokens, d).

    What is rounded to the precision of the values, and kept, are exponentials that are not divided
    by their sums (batch, windows, heads, tokens, 1): products are divided, which are smaller.
    Source of this and of the backward: FlashAttention, arXiv 2205.14135, section 3, appendix B.
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
        lengths = _inverse_lengths(query, scale.dtype), _inverse_lengths(key, scale.dtype)
        scores = _scaled(query, lengths[0] * scale) @ _scaled(key, lengths[1]).transpose(-2, -1)
        scores = scores + bias if mask is None else scores + bias + mask
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp().to(value.dtype)
        sums = exponentials.sum(-1, keepdim=True, dtype=scores.dtype)
        mixed = ((exponentials @ value) / sums).to(value.dtype)
        return mixed, exponentials, sums, *lengths

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        query, key, value, scale, mixed, exponentials, sums, *lengths = ctx.saved_tensors
        divided = (gradient / sums).to(value.dtype)
        for_value = exponentials.transpose(-2, -1) @ divided
        # Sum over keys of weight times gradient, which is that over d of what came out.
        mean = (divided.to(sums.dtype) * mixed).sum(-1, keepdim=True)
        for_weights = divided @ value.transpose(-2, -1)
        for_scores = (exponentials * (for_weights - mean)).to(value.dtype)
        for_query, for_scale = _unscaled(
            for_scores @ _scaled(key, lengths[1]), query, lengths[0], scale
        )
        for_key, _unused = _unscaled(
            for_scores.transpose(-2, -1) @ _scaled(query, lengths[0] * scale),
            key,
            lengths[1],
            torch.ones_like(scale),
        )
        for_bias = for_scores.to(sums.dtype).sum((0, 1))
        return for_query, for_key, for_value, for_scale, for_bias, None


_attend: Any = _Attention.apply


def _inverse_lengths(vectors: Tensor, precise: torch.dtype) -> Tensor:
    """Return one over the lengths of (..., d), (..., 1)."""
    squares = vectors.to(precise).square()
    return squares.sum(-1, keepdim=True).clamp_min(SHORTEST**2).rsqrt()


def _scaled(vectors: Tensor, factors: Tensor) -> Tensor:
    """Multiply in the precision of the factors, and round to that of the vectors."""
    return (vectors.to(factors.dtype) * factors).to(vectors.dtype)


def _unscaled(
    gradient: Tensor, vectors: Tensor, lengths: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the gradients of vectors and scale from that of directions times scale.

    What lies along a direction has no effect on it.
    """
    directions, gradient = vectors.to(scale.dtype) * lengths, gradient.to(scale.dtype)
    along = (gradient * directions).sum(-1, keepdim=True)
    for_vectors = (gradient - directions * along) * (lengths * scale)
    return for_vectors.to(vectors.dtype), along.sum((0, 1, 3))[..., None]


@torch.library.custom_op(
    "swinv2::mask_regions",
    mutates_args=(),
    schema="(Tensor regions, float across, int padding) -> Tensor",
    tags=torch.Tag.flexible_layout,
)
def mask_regions(regions: Tensor, across: float, padding: int) -> Tensor:
    """Give what is added to scores, (windows, 1, queries, keys), float32.

    Args:
        regions: (windows, tokens), int64.
        across: what is added between tokens of different regions.
        padding: the region that nothing may attend to.
    """
    queries, keys = regions[:, None, :, None], regions[:, None, None, :]
    mask = torch.where(queries == keys, 0.0, across)
    return mask.masked_fill_(keys == padding, float("-inf"))


@mask_regions.register_fake
def _(regions: Tensor, across: float, padding: int) -> Tensor:  # noqa: ARG001
    windows, tokens = regions.shape
    return regions.new_empty(windows, 1, tokens, tokens, dtype=torch.float32)
