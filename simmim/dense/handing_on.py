"""What a dense stage hands on: the encoder directory, and encoder with head for transformers."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simmim.dense.backbone import Start
from simmim.engine.run import RunFolder
from simmim.recipe import recipe_hash
from swinv2.bridges.transformers_backbone import encoder_from_backbone
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


def count_flops(net: nn.Module, side: int) -> int:
    """Return the operations of the matrix products of a forward pass over one square image.

    They are counted on a copy without values, so that nothing is computed.
    """
    copy = deepcopy(net).to("meta").eval()
    images = torch.empty(1, 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy(images)
    return int(counter.get_total_flops())
