"""From a stored batch to features on the device: normalisation, drop path noise, pooling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.data.order.randomness import sample_bits

RANGES = {torch.uint8: 255.0, torch.uint16: 65535.0}
"""Integer value that stands for 1.0; floating-point images are taken as they are."""


class Normalise(nn.Module):
    """Normalise stored images to about zero mean and unit variance per channel.

    Args:
        mean: mean per channel, from 0 to 1 for 8 and 16 bits, else on the scale of the images.
        std: standard deviation per channel, on the same scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            numbers = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, numbers, persistent=False)

    def forward(self, images: Tensor, flips: Tensor | None = None) -> Tensor:
        """Normalise images and flip some of them horizontally.

        Args:
            images: (batch, channels, height, width): uint8, uint16 or floating point.
            flips: bool (batch,), which images are flipped; None flips none.

        Returns:
            float32 of the same shape, contiguous.
        """
        scale = RANGES.get(images.dtype, 1.0)
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        normal = (pixels - self.mean * scale) / (self.std * scale)
        if flips is None:
            return normal
        return torch.where(flips.view(-1, 1, 1, 1), normal.flip(-1), normal)


def sample_drop_path_noise(encoder: Any, batch: Batch, seed: int) -> Tensor | None:
    """Return the `drop_path_noise` of `SwinV2.encode`; None if nothing is dropped.

    Each sample has its own numbers in each epoch, derived from its address.

    Args:
        encoder: an `ImageEncoder`, or one of clips.
        batch: the samples.
        seed: seed of the training.
    """
    if not encoder.training or not encoder.drop_path:
        return None
    blocks = len(encoder.blocks)
    bits = sample_bits(seed, "drop path", batch.addresses.numpy(), 2 * blocks)
    noise = torch.from_numpy((bits >> 33).astype("int32")).view(-1, blocks, 2)
    return noise.to(batch.images.device, non_blocking=True)


def pooled_features(encoder: Any, images: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
    """Return the average-pooled output of an encoder, an `ImageEncoder` or one of clips.

    Normalised images (batch, channels, height, width), or clips (batch, frames, channels, height,
    width), become (batch, num_features).
    """
    return pool(encoder.encode(encoder.embed(images), drop_path_noise))


def pool(tokens: Tensor) -> Tensor:
    """Average over all positions: (batch, *map, channels) to (batch, channels)."""
    return tokens.mean(dim=tuple(range(1, tokens.ndim - 1)))
