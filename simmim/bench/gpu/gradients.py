"""A training step without the pipeline, which a rented machine may lack parts of.

The engine's own (`simmim.engine.loop`) takes accelerate, and imports settings and loaders, which
need pydantic and simplejpeg.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def assign_gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Set the gradients of all parameters, which have none before.

    As `backward` does it, which is the loop's to call (simmim.engine.loop).
    """
    weights = [parameter for parameter in parameters if parameter.requires_grad]
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient


def adamw(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Build AdamW as training does, fused on a GPU."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda" or None)


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, compute_loss: Callable[[], Tensor]
) -> Tensor:
    """Take an optimiser step and return its loss; nothing waits for the device."""
    loss = compute_loss()
    assign_gradients(loss, model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 5.0, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
