"""CUDA's rules of autocast without a GPU: emulated on the CPU, and as they are on fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from simmim.bench.cuda_rules import cuda_rules


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Run under CUDA's rules of autocast, on the CPU."""
    with torch.autocast("cpu", dtype), cuda_rules():
        yield


class WithoutDevice(TorchFunctionMode):
    """Replace what Python's bindings ask the device for, by operators."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.__getitem__:
            return _indexed(*args)
        if function is Tensor.__setitem__ or function is Tensor.copy_:
            tensor, *index, value = args  # without values only shapes can be wrong
            (_indexed(tensor, index[0]) if index else tensor).expand_as(value)
            return tensor
        if function is Tensor.contiguous:
            return torch.clone(*args, memory_format=torch.contiguous_format)
        if getattr(function, "__name__", "") == "scaled_dot_product_attention":
            return torch.empty_like(args[2])  # which kernel runs is for the device to choose
        return function(*args, **kwargs or {})


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    parts = index if isinstance(index, tuple) else (index,)
    axis, named = 0, sum(part is not None and part is not ... for part in parts)
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(axis)
            axis += 1
        elif part is ...:
            axis = tensor.ndim - named
        elif isinstance(part, slice):
            start, stop, step = part.indices(tensor.shape[axis])
            tensor = torch.ops.aten.slice(tensor, axis, start, stop, step)
            axis, named = axis + 1, named - 1
        else:
            tensor, named = tensor.select(axis, part), named - 1
    return tensor


@contextmanager
def fake_cuda(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run on CUDA tensors that have only types and shapes, under CUDA's own autocast.

    The module's weights are replaced by such tensors. Gradients would need a GPU.
    """
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutDevice(), torch.no_grad():
        for owner in module.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                    owner._parameters[name] = nn.Parameter(fake, requires_grad=False)
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if not torch.autocast_decrement_nesting():
                torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", before)
