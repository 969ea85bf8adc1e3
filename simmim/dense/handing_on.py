"""What a dense stage hands on: the encoder directory, and encoder with head for transformers."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simmim.dense.backbone import Start
from simmim.engine.run import RunFolder
from simmim.recipe import recipe_hash
from swinv2 import SwinV2
from swinv2.bridges.transformers_backbone import encoder_from_backbone
from swinv2.flops import forward_flops
from swinv2.weights import Provenance, atomic_folder, save_encoder

PREPROCESSING = "preprocessing.json"
"""File beside the model that says how its images were normalised."""


def save_dense(
    net: Any,
    backbone: Any,
    run: RunFolder,
    folder: Path,
    *,
    start: Start,
    recipe: Any,
    step: int,
    samples: int,
) -> None:
    """Write the encoder directory of a run, and the whole model as `from_pretrained` loads it.

    `swinv2.bridges.transformers_backbone.register_backbone` comes before `from_pretrained`.
    """
    save_encoder(
        encoder_from_backbone(backbone),
        run.encoder,
        mean=start.mean,
        std=start.std,
        provenance=Provenance(step=step, samples_seen=samples, recipe_hash=recipe_hash(recipe)),
    )
    with atomic_folder(folder, may_replace=_is_dense) as written:
        net.save_pretrained(written)
        text = json.dumps({"mean": list(start.mean), "std": list(start.std)}, indent=1)
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
