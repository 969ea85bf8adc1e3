"""Targets: what is predicted of the hidden part of an image. A new target is a class here.

A target is a map (batch, channels, rows, columns) with a position for every `stride` pixels,
rounded up. Width of the decoder, baseline, pictures, FLOPs and exports follow from it.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.method.encoder_protocol import encoder_flops

TARGET_WINDOW = 47
VARIANCE_EPS = 1e-6
CACHED_VALUES = 2**17
"""Values whose intermediate results fit into the cache of a processor's core."""


class Target(Protocol):
    """The target of a prediction; no part of the model that is trained, saved or exported."""

    @property
    def channels(self) -> int:
        """Channels of the map."""

    @property
    def stride(self) -> int:
        """Pixels between neighbouring positions of the map: 1 for pixels."""

    @property
    def baseline(self) -> str:
        """Name of the loss of predicting the mean of the visible positions, in metrics."""

    @property
    def is_pixels(self) -> bool:
        """Whether the model predicts plain pixels or those that `to_pixels` restores.

        Other predictions are not drawn, and their decoder is not exported.
        """

    @property
    def flops(self) -> int:
        """FLOPs of the target of one image, which need no backward pass."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the target of normalised images (batch, channels, height, width)."""

    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Return normalised pixels from a prediction, to display it.

        Args:
            prediction: (batch, channels, height, width).
            images: the images that were predicted.
        """


@dataclass(frozen=True)
class Pixels:
    """The pixels as they are: SimMIM's default."""

    channels: int
    stride: int = 1
    baseline: str = "mean_color_loss"
    is_pixels: bool = True
    flops: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Return the prediction."""
        del images
        return prediction


@dataclass(frozen=True)
class NormalisedPixels(Pixels):
    """Pixels normalised by the mean and variance of the window around each (SwinV2)."""

    window: int = TARGET_WINDOW
    """Side of the window in pixels; odd."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the normalised images; see `normalise_target`."""
        return normalise_target(images, self.window)

    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Return pixels with the mean and variance of the images; see `denormalise_target`."""
        return denormalise_target(prediction, images, self.window)


class Features:
    """The last map of a frozen encoder, each token normalised by a LayerNorm without weights.

    The encoder sees the whole image. It is not a submodule of the model: it is not
    trained, averaged, sharded or saved. It moves to the device of the images.

    Args:
        encoder: an `ImageEncoder`; it is frozen, in evaluation mode.
        scale: number or one per channel, by which images are multiplied first.
        shift: number or one per channel, added after that: both for an encoder that was trained
            with another mean and std than the images are normalised with.

    Source: BEiT v2 and EVA predict features of a frozen model; the normalisation is data2vec's.
    """

    is_pixels = False
    baseline = "mean_feature_loss"

    def __init__(
        self, encoder: Any, *, scale: tuple[float, ...] = (1.0,), shift: tuple[float, ...] = (0.0,)
    ) -> None:
        assert isinstance(encoder, nn.Module)
        frozen: Any = encoder.eval().requires_grad_(requires_grad=False)
        self.encoder = frozen
        self.channels: int = frozen.num_features
        self.stride: int = frozen.strides[-1]
        self.flops = encoder_flops(frozen)
        self._same = set(scale) == {1.0} and set(shift) == {0.0}
        self._scale, self._shift = (
            torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (scale, shift)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the normalised features of whole images, float32."""
        device = images.device
        if self._scale.device != device or next(self.encoder.parameters()).device != device:
            self.encoder.to(device)
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        if not self._same:
            images = images * self._scale + self._shift
        tokens = self.encoder.encode(self.encoder.embed(images)).float()
        return F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 3, 1, 2)

    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Raise ValueError: features cannot be drawn."""
        del prediction, images
        raise ValueError("features cannot be drawn: the model predicts no pixels.")


def normalise_target(images: Tensor, window: int = TARGET_WINDOW) -> Tensor:
    """Normalise each pixel by the mean and variance of the window around it (SimMIM code, SwinV2).

    The variance is unbiased, 1e-6 is added to it, and windows are cropped at the border. Neither
    autocast nor TF32 changes the result: it is computed without matrix products, at least in
    single precision.

    Args:
        images: (batch, channels, height, width), floating point.
        window: side of the window in pixels; odd.

    Raises:
        ValueError: the window is even, or smaller than 3 pixels.
    """
    if not images.is_cpu or len(images) < 2:
        return _normalise(images, window)
    number = max(1, CACHED_VALUES // max(1, images[0].numel()))
    return torch.cat([_normalise(part, window) for part in torch.split(images, number)])


def denormalise_target(values: Tensor, images: Tensor, window: int = TARGET_WINDOW) -> Tensor:
    """Undo `normalise_target` with the mean and variance of ``images``, to display a prediction.

    Args:
        values: (batch, channels, height, width), normalised.
        images: images to take the statistics from, same shape.
        window: side of the window in pixels, as in `normalise_target`.
    """
    mean, variance, offset = _local_statistics(images, window)
    return values * variance.sqrt() + mean + offset


def _normalise(images: Tensor, window: int) -> Tensor:
    mean, variance, offset = _local_statistics(images, window)
    return (images - offset).sub_(mean).div_(variance.sqrt_())


def _local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance + 1e-6 and offset: of the window around each pixel of image - offset.

    At least in single precision. Relative to the image's own mean, the offset, mean(x²) - mean(x)²
    loses fewer digits.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(
            f"the target window is {window} pixels; it must be odd and at least 3, such as 47."
        )
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    offset = images.mean(dim=(2, 3), keepdim=True)
    centred = images - offset
    count = _window_counts(images, window)
    window_sum = _window_sum_on_cpu if images.is_cpu else _window_sum
    mean = window_sum(centred, window).div_(count)
    variance = window_sum(centred.square_(), window).div_(count - 1)
    variance.addcmul_(mean * (count / (count - 1)), mean, value=-1)
    return mean, variance.clamp_(min=0).add_(VARIANCE_EPS), offset


def _window_sum(values: Tensor, window: int) -> Tensor:
    """Sum over windows axis by axis: 2 · window sums per pixel instead of window²."""
    half = window // 2
    rows = F.avg_pool2d(values, (window, 1), 1, (half, 0), divisor_override=1)
    return F.avg_pool2d(rows, (1, window), 1, (0, half), divisor_override=1)


def _window_sum_on_cpu(values: Tensor, window: int) -> Tensor:
    """Return `_window_sum`, in a tenth of the pooling's time.

    Along rows, differences of running sums, in float64: float32 would lose digits next to a bright
    pixel. Along columns, one sum over shifted rows, which is vectorised.
    """
    half = window // 2
    running = F.pad(values, (half + 1, half)).cumsum(-1, dtype=torch.float64)
    rows = (running[..., window:] - running[..., :-window]).to(values.dtype)
    return F.pad(rows, (0, 0, half, half)).unfold(-2, window, 1).sum(-1)


def _window_counts(images: Tensor, window: int) -> Tensor:
    """Return the number of pixels in the window around each pixel, (height, width)."""
    counts = []
    for length in images.shape[-2:]:
        position = torch.arange(length, device=images.device)
        first = (position - window // 2).clamp(min=0)
        last = (position + window // 2).clamp(max=length - 1)
        counts.append((last - first + 1).to(images.dtype))
    return counts[0][:, None] * counts[1]
