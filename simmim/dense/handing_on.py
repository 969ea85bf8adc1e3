"""Encoder and head of a dense stage, written for transformers and counted in operations."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swinv2 import SwinV2
from swinv2.flops import forward_flops
from swinv2.weights import atomic_folder

PREPROCESSING = "preprocessing.json"
"""File beside the model that says how its images were normalised."""


def save_dense(net: Any, folder: Path, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write encoder and head as `from_pretrained` loads them, with how images are normalised.

    `swinv2.bridges.transformers_backbone.register_backbone` comes before `from_pretrained`.
    """
    with atomic_folder(folder, may_replace=_is_dense) as written:
        net.save_pretrained(written)
        text = json.dumps({"mean": list(mean), "std": list(std)}, indent=1)
        (written / PREPROCESSING).write_text(text + "\n", encoding="utf-8")


def _is_dense(path: Path) -> bool:
    return (path / PREPROCESSING).is_file()


def count_flops(net: Any, backbone: Any, side: int) -> int:
    """Return the operations of the matrix products of a forward pass over one square image.

    Those of the encoder follow from its sizes; those of the head are counted on a copy of it
    without values, so that nothing is computed.
    """
    encoder = backbone.encoder
    backbone.encoder = _EmptyMaps(encoder)
    try:
        head = deepcopy(net).to("meta").eval()
    finally:
        backbone.encoder = encoder
    images = torch.empty(1, encoder.config.in_channels, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(pixel_values=images)
    return forward_flops(encoder.config) + int(counter.get_total_flops())


class _EmptyMaps(nn.Module):
    """What stands for an encoder where nothing but the shape of its maps matters."""

    def __init__(self, encoder: SwinV2) -> None:
        super().__init__()
        self.sizes = list(zip(encoder.config.stage_dims, encoder.strides, strict=True))

    def features(self, images: Tensor, chances: Tensor | None = None) -> list[Tensor]:
        del chances
        count, _, height, width = images.shape
        return [
            images.new_empty(count, dim, -(-height // stride), -(-width // stride))
            for dim, stride in self.sizes
        ]
