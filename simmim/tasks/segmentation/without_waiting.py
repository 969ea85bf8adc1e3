"""Keep the steps of transformers' heads from waiting for a GPU."""

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
