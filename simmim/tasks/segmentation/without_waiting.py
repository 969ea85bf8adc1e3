"""Keep the steps of transformers' heads from waiting for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without waiting for a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")


def skip_finite_checks(net: nn.Module, layer: type[nn.Module]) -> None:
    """Let the layers of a pixel decoder not look whether their output is finite, until `train()`.

    In training each of them would wait for the device, to clamp infinities. There are none after a
    layer norm, whose output is finite or NaN; and there is no dropout, all else that training
    changes.

    Args:
        net: the model.
        layer: class of the layers, which end with a layer norm.
    """
    for part in net.modules():
        if isinstance(part, layer):
            part.training = False


@contextmanager
def sending_numbers(module: Any) -> Iterator[None]:
    """Let a module of transformers send Python numbers to a GPU without waiting for it."""
    with mock.patch.object(module, "torch", _Torch()):
        yield


class _Torch:
    """torch, with other functions where those of torch wait."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(
        data: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Return a tensor of the data, as `torch.as_tensor` does."""
        if device is None or isinstance(data, Tensor):
            return torch.as_tensor(data, dtype=dtype, device=device)
        return to_device(torch.as_tensor(data, dtype=dtype), device)

    as_tensor = tensor
