"""Losses of the prediction. They share one signature: (prediction, target) → elementwise loss."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from simmim.method.settings import LossName

ElementwiseLoss = Callable[[Tensor, Tensor], Tensor]


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return |prediction - target|, SimMIM's default."""
    return (prediction - target).abs()


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return l2 / 2 for differences below 1, and l1 - 1/2 above."""
    return F.smooth_l1_loss(prediction, target, reduction="none")


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Return (prediction - target) squared."""
    return (prediction - target).square()


def loss_function(name: LossName) -> ElementwiseLoss:
    """Return the loss function of this name.

    Raises:
        ValueError: the name is unknown.
    """
    match name:
        case "l1":
            return l1
        case "smooth_l1":
            return smooth_l1
        case "l2":
            return l2
        case _:
            raise ValueError(f"loss {name!r} is unknown: choose l1, smooth_l1 or l2.")


def masked_mean(values: Tensor, hidden: Tensor) -> Tensor:
    """Return sum(values · hidden) / (sum(hidden) + 1e-5) / channels (SimMIM code).

    Args:
        values: (batch, channels, rows, columns).
        hidden: (batch, rows, columns), True or 1 for positions that count, such as pixels.
    """
    weights = hidden.to(values.dtype)
    return (values * weights[:, None]).sum() / (weights.sum() + 1e-5) / values.shape[1]


def mean_color_loss(
    target: Tensor, hidden: Tensor, loss: ElementwiseLoss = l1, counted: Tensor | None = None
) -> Tensor:
    """Return the loss of predicting the mean of each image's visible target, such as its colour.

    The baseline that a trained model has to beat.

    Args:
        target: (batch, channels, rows, columns), prediction target, for example pixels.
        hidden: bool (batch, rows, columns), True = hidden.
        loss: elementwise loss.
        counted: bool (batch, rows, columns), positions to average over; ``hidden`` by default.
    """
    visible = (~hidden)[:, None].to(target.dtype)
    total = (target * visible).sum(dim=(2, 3), keepdim=True)
    color = total / visible.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return masked_mean(
        loss(color.expand_as(target), target), hidden if counted is None else counted
    )
