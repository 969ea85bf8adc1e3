"""A small encoder directory."""

from pathlib import Path

import pytest
import torch

from swinv2 import SwinV2, SwinV2Config
from swinv2.weights import save_encoder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def small_encoder(seed: int = 3) -> SwinV2:
    """An encoder with no trivial weight: in fresh ones every block is the identity."""
    config = SwinV2Config(
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=(1, 2),
        num_heads=(1, 2),
        window_size=4,
    )
    encoder = SwinV2(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder


@pytest.fixture
def encoder_directory(tmp_path: Path) -> Path:
    """An encoder directory as a pretraining run leaves it."""
    return save_encoder(small_encoder(), tmp_path / "encoder", mean=MEAN, std=STD)
