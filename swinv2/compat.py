"""Private names of torch and Python, each with the reason that there is no public way.

No other module of this package uses one. tests/swinv2/test_compat.py tells when one changes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

HAS_LINEAR_POINTWISE = hasattr(torch.ops.mkldnn, "_linear_pointwise")
COMPILING_IS_EXPORTING = torch.__version__.startswith("2.8.")
"""Whether `torch.compiler.is_exporting` is True wherever Dynamo traces: in torch 2.8."""


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `rows @ weight.T + bias`, computed by oneDNN.

    `F.linear` calls MKL for float32, which is slower on AMD processors, and copies the bias first
    for bfloat16. This operator is what torch.compile's CPU backend calls.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def softmax_backward_in_place(gradient: Tensor, weights: Tensor) -> None:
    """Replace the gradient of a softmax over the last dimension by that of its argument.

    Autograd's own formula allocates its result; only the operator behind it can write in place.
    """
    torch._softmax_backward_data(gradient, weights, -1, gradient.dtype, grad_input=gradient)


def in_dispatch_mode() -> bool:
    """Return whether a dispatch mode, such as a FLOP counter, intercepts operators.

    Torch has no public question for it; of the private ones this is the cheapest.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def copied_function(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a copy of a function with a code object of its own.

    Dynamo's cache, its limit of graphs and its memory of changed sizes belong to a code object and
    its name, and it has no public way to give a function a cache of its own.
    """
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def lengths_of_one_allowed() -> AbstractContextManager[None]:
    """Return a context in which `torch.export` lets a dynamic length be 1.

    By default a trace assumes that no dynamic length is ever 1; the setting has no public name.
    """
    allowed: AbstractContextManager[None] = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True
    )
    return allowed


def export_is_refused(error: Exception) -> bool:
    """Return whether an exception is `torch.export` refusing a model or its dynamic sizes.

    It has no public name.
    """
    return isinstance(error, torch._dynamo.exc.UserError)
