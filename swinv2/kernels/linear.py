"""Linear layers on oneDNN, which is the fastest on a CPU.

oneDNN is part of PyTorch. For float32 PyTorch calls MKL instead, which is slower on AMD processors;
for bfloat16 it calls oneDNN, but copies the bias into the output first. Both compute in IEEE
arithmetic and sum in an order fixed by the shapes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swinv2.compat import onednn_linear
from swinv2.kernels.dispatch import use_onednn, use_operators
from swinv2.kernels.precision import autocast_dtype

ROWS_AT_A_TIME = 1024  # of a weight gradient: both operands are read by column, from the cache

CAST = (torch.float32, torch.bfloat16, torch.float16)
"""The types that autocast casts; double precision is not one of them."""


class Linear(nn.Linear):
    """`nn.Linear` on the fastest kernel."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the last axis."""
        return linear(tokens, self.weight, self.bias)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map (..., inputs) to (..., outputs) as `F.linear` does, under autocast too.

    `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off here, as in all of PyTorch.
    """
    dtype = autocast_dtype(tokens.device)
    if dtype is not None and tokens.dtype in CAST:
        # One copy both casts windows and makes them contiguous.
        tokens = tokens.to(dtype, memory_format=torch.contiguous_format)
    elif tokens.dtype != weight.dtype:
        return F.linear(tokens, weight, bias)  # raises the usual error
    if not use_onednn(tokens):
        return F.linear(tokens, weight, bias)
    rows = tokens.reshape(-1, tokens.shape[-1])
    product = _product_operator if use_operators() else _apply
    mapped: Tensor = product(
        rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    )
    return mapped.view(*tokens.shape[:-1], len(weight))


def _weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    if gradient.dtype != torch.float32:
        return gradient.t() @ rows
    total: Tensor | None = None
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        piece = slice(start, start + ROWS_AT_A_TIME)
        product = onednn_linear(gradient[piece].t(), rows[piece].t(), None)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


_product_operator = torch.library.custom_op(
    "swinv2::linear",
    onednn_linear,
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
_weight_gradient_operator = torch.library.custom_op(
    "swinv2::linear_weight_gradient",
    _weight_gradient,
    mutates_args=(),
    schema="(Tensor gradient, Tensor rows) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


@_product_operator.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return rows.new_empty(rows.shape[0], weight.shape[0])


@_weight_gradient_operator.register_fake
def _(gradient: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(gradient.shape[1], rows.shape[1])


class _Product(torch.autograd.Function):
    """The operators without the dispatcher, which is a third of the time of small products."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = onednn_linear(rows, weight, bias)
        _save(ctx, (rows, weight, bias), product)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradient, onednn_linear, _weight_gradient)


def _gradients(
    ctx: Any,
    gradient: Tensor,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    weight_gradient: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor | None, ...]:
    rows, weight = ctx.saved_tensors
    for_rows, for_weight, for_bias = ctx.needs_input_grad
    return (
        product(gradient, weight.t(), None) if for_rows else None,
        weight_gradient(gradient, rows) if for_weight else None,
        gradient.sum(0) if for_bias else None,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    rows, weight, _ = inputs
    ctx.save_for_backward(rows, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, gradient, _product_operator, _weight_gradient_operator)


_product_operator.register_autograd(_backward, setup_context=_save)
_apply: Any = _Product.apply
