"""Precision under autocast, the same on every device.

Autocast has rules of its own for each device: on CUDA it casts `torch.mv`, and returns LayerNorm in
float32; on a CPU it does neither. Here each function decides itself in which precision it computes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast casts to on a device, None without autocast."""
    kind = device.type
    # Autocast does not know the meta device. Compilers of torch 2.8 cannot trace the question.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the precision of the tensors, even under autocast."""
    if autocast_dtype(device) is not None:
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def outside_autocast(
    function: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Decorate a function of tensors so that it computes in their precision under autocast, too.

    The first argument tells the device. A backward is called under autocast if the caller of
    `backward` is, or if it is compiled.
    """

    @wraps(function)
    def precise(tensor: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with without_autocast(tensor.device):
            return function(tensor, *args, **kwargs)

    return precise


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that computes in float32 and returns the type of its input.

    With float32 results under autocast, all of the main branch would be float32.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise the last axis."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if not tokens.is_cpu:  # only the CPU's kernel takes weights of another type
            weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)
        with without_autocast(tokens.device):
            return F.layer_norm(tokens, self.normalized_shape, weight, bias, self.eps)
