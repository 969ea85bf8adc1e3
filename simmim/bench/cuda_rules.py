"""CUDA's rules of autocast, emulated on the CPU.

Autocast casts other functions on CUDA than on a CPU, and tensors of other types take other memory.
The rules are PyTorch's, from "CUDA Ops that can autocast" in the documentation of torch.amp.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from simmim.compat import map_tensors

LOWER = {
    "__matmul__",
    "addbmm",
    "addmm",
    "addmv",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "conv1d",
    "conv2d",
    "conv3d",
    "einsum",
    "linear",
    "matmul",
    "mm",
    "multi_dot",
    "mv",
    "scaled_dot_product_attention",
}
"""Functions that compute in the lower precision."""
FLOAT32 = {
    "__pow__",
    "__rpow__",
    "acos",
    "asin",
    "binary_cross_entropy_with_logits",
    "cdist",
    "cosh",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "cumprod",
    "cumsum",
    "dist",
    "erfinv",
    "exp",
    "expm1",
    "group_norm",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "log",
    "log10",
    "log1p",
    "log2",
    "log_softmax",
    "logsumexp",
    "mse_loss",
    "nll_loss",
    "norm",
    "normalize",
    "pow",
    "prod",
    "reciprocal",
    "rsqrt",
    "sinh",
    "smooth_l1_loss",
    "softmax",
    "softmin",
    "softplus",
    "sum",
    "tan",
    "vector_norm",
}
"""Functions that compute in, and return, float32."""


class CudaRules(TorchFunctionMode):
    """Cast as CUDA's autocast does wherever the CPU's is enabled."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        cast = name in LOWER | FLOAT32 and "out" not in kwargs
        if not cast or not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        dtype = torch.get_autocast_dtype("cpu") if name in LOWER else torch.float32
        args, kwargs = map_tensors(lambda tensor: _cast(tensor, dtype), (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tensor.to(dtype) if tensor.dtype in castable else tensor


@contextmanager
def cuda_rules() -> Iterator[None]:
    """Choose kernels and cast types as on CUDA, for tensors on the CPU."""
    on_cpu = Tensor.is_cpu
    Tensor.is_cpu = False
    try:
        with CudaRules():
            yield
    finally:
        Tensor.is_cpu = on_cpu
