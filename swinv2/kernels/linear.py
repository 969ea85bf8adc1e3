"""The product of a linear layer on the kernel that is fastest on the machine at hand.

On a CPU these are oneDNN's, which are in PyTorch. For float32 PyTorch calls MKL instead, which is
slower on AMD processors; for bfloat16 it calls oneDNN, but copies the bias into the output first.
Both compute in IEEE arithmetic and add up in an order fixed by the shapes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS_AT_A_TIME = 1024  # of a weight gradient: both operands are read across, so keep them in cache

CAST = (torch.float32, torch.bfloat16, torch.float16)
"""What autocast casts: double precision stays what it is."""

ONEDNN_IS_FAST = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


class Linear(nn.Linear):
    """nn.Linear on the fastest kernel."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the last axis."""
        return linear(tokens, self.weight, self.bias)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map (..., inputs) to (..., outputs) as F.linear does, under autocast too.

    `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off here as everywhere.
    """
    if torch.is_autocast_enabled(tokens.device.type) and tokens.dtype in CAST:
        # Windows are cast and laid out in a row by one copy.
        dtype = torch.get_autocast_dtype(tokens.device.type)
        tokens = tokens.to(dtype, memory_format=torch.contiguous_format)
    elif tokens.dtype != weight.dtype:
        return F.linear(tokens, weight, bias)  # which says what is wrong
    if not _onednn_serves(tokens):
        return F.linear(tokens, weight, bias)
    rows = tokens.reshape(-1, tokens.shape[-1])
    product = _product_operator if operators_are_watched() else _apply
    mapped: Tensor = product(
        rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    )
    return mapped.view(*tokens.shape[:-1], len(weight))


def being_exported() -> bool:
    """Tell whether a graph is made for other programs, which have PyTorch's own operators alone."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def operators_are_watched() -> bool:
    """Tell whether what is computed is made a graph of, or counted, operator by operator."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _onednn_serves(tokens: Tensor) -> bool:
    """Tell whether oneDNN is there, fast, and given tokens that it takes."""
    return (
        tokens.dtype in (torch.float32, torch.bfloat16)
        and tokens.device.type == "cpu"
        and tokens.numel() > 0
        and not being_exported()
        and ONEDNN_IS_FAST
        and (torch.compiler.is_compiling() or bool(torch._C._get_mkldnn_enabled()))
    )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def _weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    if gradient.dtype != torch.float32:
        return gradient.t() @ rows
    total: Tensor | None = None
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        piece = slice(start, start + ROWS_AT_A_TIME)
        product = _product(gradient[piece].t(), rows[piece].t(), None)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


_product_operator = torch.library.custom_op(
    "swinv2::linear",
    _product,
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.flexible_layout,
)
_weight_gradient_operator = torch.library.custom_op(
    "swinv2::linear_weight_gradient",
    _weight_gradient,
    mutates_args=(),
    schema="(Tensor gradient, Tensor rows) -> Tensor",
    tags=torch.Tag.flexible_layout,
)


@_product_operator.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return rows.new_empty(rows.shape[0], weight.shape[0])


@_weight_gradient_operator.register_fake
def _(gradient: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(gradient.shape[1], rows.shape[1])


class _Product(torch.autograd.Function):
    """What the operators do, without a dispatcher on the way: of small products that is a third."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = _product(rows, weight, bias)
        _keep(ctx, (rows, weight, bias), product)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradient, _product, _weight_gradient)


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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    rows, weight, _ = inputs
    ctx.save_for_backward(rows, weight)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, gradient, _product_operator, _weight_gradient_operator)


_product_operator.register_autograd(_differentiate, setup_context=_keep)
_apply: Any = _Product.apply
