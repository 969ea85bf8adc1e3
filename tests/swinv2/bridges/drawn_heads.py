"""Random heads for exports."""

from collections.abc import Callable

import torch
from torch import nn

from swinv2 import SwinV2
from swinv2.bridges.checkpoints import ClassifierHead, MaskedImageHead

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
Build = Callable[..., SwinV2]
Same = Callable[[nn.Module, nn.Module], None]


def draw_head(encoder: SwinV2) -> MaskedImageHead:
    generator = torch.Generator().manual_seed(7)
    channels = encoder.strides[-1] ** 2 * encoder.config.in_channels
    return MaskedImageHead(
        mask_token=torch.randn(1, 1, 1, encoder.config.embed_dim, generator=generator),
        weight=torch.randn(channels, encoder.num_features, 1, 1, generator=generator),
        bias=torch.randn(channels, generator=generator),
        norm_target=True,
    )


def draw_classifier(encoder: SwinV2) -> ClassifierHead:
    generator = torch.Generator().manual_seed(8)
    return ClassifierHead(
        weight=torch.randn(5, encoder.num_features, generator=generator),
        bias=torch.randn(5, generator=generator),
    )
