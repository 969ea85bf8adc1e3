"""Bytes to what the encoder takes, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Turns uint8 images into numbers of about zero mean and unit variance a channel.

    Args:
        mean: of each channel, on a scale from 0 to 1.
        std: of each channel, on a scale from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            numbers = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) * 255
            self.register_buffer(name, numbers, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (batch, channels, height, width) to float32 of the same shape."""
        return (images - self.mean) / self.std
