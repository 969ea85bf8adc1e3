"""The product of a linear layer on the kernel that is fastest on the machine at hand.

For float32, PyTorch's CPU builds call MKL, which runs AVX2 kernels on AMD processors: half the rate
of oneDNN's AVX-512 kernels, which are in PyTorch too and serve bfloat16. This calls them for
float32 as well. Both compute in IEEE float32 and add up in an order fixed by the shapes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS_AT_A_TIME = 1024  # of a weight gradient: both operands are read across, so keep them in cache


class Linear(nn.Linear):
    """nn.Linear on the fastest kernel."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the last axis."""
        return linear(tokens, self.weight, self.bias)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map (..., inputs) to (..., outputs) as F.linear does, under autocast too.

    `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off here as everywhere.
    """
    if not _onednn_serves(tokens, weight):
        return F.linear(tokens, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        tokens, weight = tokens.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows = tokens.reshape(-1, tokens.shape[-1])
    mapped: Tensor
    if torch.is_grad_enabled():
        mapped = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    else:
        mapped = _map(rows, weight, bias)
    return mapped.view(*tokens.shape[:-1], len(weight))


def _onednn_serves(tokens: Tensor, weight: Tensor) -> bool:
    """Tell whether oneDNN is there, fast, and given tensors that it takes."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or tokens.device.type != "cpu":
        return False
    taken = (torch.float32, torch.bfloat16)
    if torch.is_autocast_enabled("cpu"):
        fits = torch.get_autocast_dtype("cpu") == torch.bfloat16 and tokens.dtype in taken
    else:
        fits = tokens.dtype == weight.dtype and tokens.dtype in taken
    plain = type(tokens) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return fits and plain and tokens.numel() > 0 and _onednn_is_fast()


def _onednn_is_fast() -> bool:
    return (
        bool(torch._C._get_mkldnn_enabled())
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _map(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    mapped: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return mapped


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _map(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        return (
            _map(gradient, weight.t(), None) if for_rows else None,
            _weight_gradient(gradient, rows) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


def _weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    if gradient.dtype != torch.float32:
        return gradient.t() @ rows
    total: Tensor | None = None
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        piece = slice(start, start + ROWS_AT_A_TIME)
        product = _map(gradient[piece].t(), rows[piece].t(), None)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total
