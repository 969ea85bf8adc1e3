"""The product of a linear layer on the kernel that is fastest on the machine at hand.

On a CPU these are oneDNN's, which are in PyTorch. For float32 PyTorch calls MKL instead, which is
slower on AMD processors; for bfloat16 it calls oneDNN, but copies the bias into the output first.
Both compute in IEEE arithmetic and add up in an order fixed by the shapes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    mapped: Tensor = _map(
        rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    )
    return mapped.view(*tokens.shape[:-1], len(weight))


def being_exported() -> bool:
    """Tell whether a graph is made for other programs, which have PyTorch's own operators alone."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


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


@torch.library.custom_op(
    "swinv2::linear",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.flexible_layout,
)
def _map(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(rows, weight, bias)


@torch.library.custom_op(
    "swinv2::linear_weight_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor rows) -> Tensor",
    tags=torch.Tag.flexible_layout,
)
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


@_map.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return rows.new_empty(rows.shape[0], weight.shape[0])


@_weight_gradient.register_fake
def _(gradient: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(gradient.shape[1], rows.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    rows, weight, _ = inputs
    ctx.save_for_backward(rows, weight)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight = ctx.saved_tensors
    for_rows, for_weight, for_bias = ctx.needs_input_grad
    return (
        _map(gradient, weight.t(), None) if for_rows else None,
        _weight_gradient(gradient, rows) if for_weight else None,
        gradient.sum(0) if for_bias else None,
    )


_map.register_autograd(_differentiate, setup_context=_keep)
