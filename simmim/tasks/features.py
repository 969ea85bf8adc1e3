"""From a stored batch to features on the device: normalisation, drop path noise, pooling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.data.order.randomness import sample_bits
from swinv2.encoder import HierarchicalEncoder

RANGES = {torch.uint8: 255.0, torch.uint16: 65535.0}
"""What stands for 1 in stored whole numbers; fractions are taken as they are."""


class Normalise(nn.Module):
    """Turns stored images into numbers of about zero mean and unit variance a channel.

    Args:
        mean: of each channel: of 8 and 16 bits on a scale from 0 to 1, of fractions as they are.
        std: of each channel, on the same scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            numbers = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, numbers, persistent=False)

    def forward(self, images: Tensor, flips: Tensor | None = None) -> Tensor:
        """Normalise and mirror images.

        Args:
            images: (batch, channels, height, width): uint8, uint16 or floating point.
            flips: bool (batch,), which of them are mirrored; None mirrors none.

        Returns:
            float32 of the same shape, contiguous.
        """
        scale = RANGES.get(images.dtype, 1.0)
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        normal = (pixels - self.mean * scale) / (self.std * scale)
        if flips is None:
            return normal
        return torch.where(flips.view(-1, 1, 1, 1), normal.flip(-1), normal)


def sample_drop_path_noise(encoder: HierarchicalEncoder, batch: Batch, seed: int) -> Tensor | None:
    """Return the `drop_path_noise` of `SwinV2.encode`; None if nothing is dropped.

    Each sample has its own numbers in each epoch, derived from its address.
    """
    if not encoder.training or not encoder.config.drop_path:
        return None
    blocks = sum(encoder.config.depths)
    bits = sample_bits(seed, "drop path", batch.addresses.numpy(), 2 * blocks)
    noise = torch.from_numpy((bits >> 33).astype("int32")).view(-1, blocks, 2)
    return noise.to(batch.images.device, non_blocking=True)


def pooled_features(
    encoder: HierarchicalEncoder, images: Tensor, drop_path_noise: Tensor | None = None
) -> Tensor:
    """Return the mean over all places of the encoder's output.

    Normalised images (batch, channels, height, width), or clips (batch, frames, channels, height,
    width), become (batch, num_features).
    """
    return pool(encoder(images, drop_path_noise))


def pool(tokens: Tensor) -> Tensor:
    """Return the mean over all places: (batch, *map, channels) to (batch, channels)."""
    return tokens.mean(dim=tuple(range(1, tokens.ndim - 1)))
