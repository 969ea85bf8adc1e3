"""Losses of the predicted pixels, and their targets.

Losses share one signature: (prediction, target) → elementwise loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.method.settings import LossName

ElementwiseLoss = Callable[[Tensor, Tensor], Tensor]

TARGET_WINDOW = 47
VARIANCE_EPS = 1e-6


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
        values: (batch, channels, height, width).
        hidden: (batch, height, width), True or 1 for pixels that count.
    """
    weights = hidden.to(values.dtype)
    return (values * weights[:, None]).sum() / (weights.sum() + 1e-5) / values.shape[1]


def normalise_target(images: Tensor, window: int = TARGET_WINDOW) -> Tensor:
    """Normalise each pixel by the mean and variance of the window around it (SimMIM code, SwinV2).

    The variance is unbiased, 1e-6 is added to it, and windows are cropped at the border.

    Args:
        images: (batch, channels, height, width), floating point.
        window: side of the window in pixels; odd.

    Raises:
        ValueError: the window is even, or smaller than 3 pixels.
    """
    mean, deviation = _local_statistics(images, window)
    return (images - mean) / deviation


def denormalise_target(values: Tensor, images: Tensor, window: int = TARGET_WINDOW) -> Tensor:
    """Undo `normalise_target` with the mean and variance of ``images``, to display a prediction.

    Args:
        values: (batch, channels, height, width), normalised.
        images: images to take the statistics from, same shape.
        window: side of the window in pixels, as in `normalise_target`.
    """
    mean, deviation = _local_statistics(images, window)
    return values * deviation + mean


def _local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation around each pixel, at least in single precision."""
    if window < 3 or window % 2 == 0:
        raise ValueError(
            f"the target window is {window} pixels; it must be odd and at least 3, such as 47."
        )
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    # Relative to the image's own mean, mean(x²) - mean(x)² loses fewer digits.
    offset = images.mean(dim=(2, 3), keepdim=True)
    centred = images - offset
    count = _window_counts(images, window)
    mean = _window_mean(centred, window)
    variance = _window_mean(centred.square(), window) - mean.square()
    variance = (variance * count / (count - 1)).clamp(min=0)
    return mean + offset, (variance + VARIANCE_EPS).sqrt()


def _window_mean(values: Tensor, window: int) -> Tensor:
    """Average over a window axis by axis: 2 · window sums per pixel instead of window²."""
    half = window // 2
    rows = F.avg_pool2d(values, (window, 1), 1, (half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, window), 1, (0, half), count_include_pad=False)


def _window_counts(images: Tensor, window: int) -> Tensor:
    """Return the number of pixels in the window around each pixel, (height, width)."""
    counts = []
    for length in images.shape[-2:]:
        position = torch.arange(length, device=images.device)
        first = (position - window // 2).clamp(min=0)
        last = (position + window // 2).clamp(max=length - 1)
        counts.append((last - first + 1).to(images.dtype))
    return counts[0][:, None] * counts[1]


def mean_color_loss(
    target: Tensor, hidden: Tensor, loss: ElementwiseLoss = l1, counted: Tensor | None = None
) -> Tensor:
    """Return the loss of predicting the mean colour of each image's visible pixels.

    The baseline that a trained model has to beat.

    Args:
        target: (batch, channels, height, width), prediction target.
        hidden: bool (batch, height, width), True = hidden.
        loss: elementwise loss.
        counted: bool (batch, height, width), pixels to average over; ``hidden`` by default.
    """
    visible = (~hidden)[:, None].to(target.dtype)
    total = (target * visible).sum(dim=(2, 3), keepdim=True)
    color = total / visible.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return masked_mean(
        loss(color.expand_as(target), target), hidden if counted is None else counted
    )
