"""Encoder and head of segmentation and detection in transformers' format, and their FLOPs."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simmim.tasks.segmentation.backbone import check_installed
from swinv2 import SwinV2
from swinv2.atomic import atomic_folder
from swinv2.bridges.transformers_backbone import register_backbone
from swinv2.flops import forward_flops

PREPROCESSING = "preprocessing.json"
"""File next to the model with the mean and std of its images."""


def save_dense(net: Any, folder: Path, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write encoder and head for `from_pretrained`, and the mean and std of images.

    Call `swinv2.bridges.transformers_backbone.register_backbone` before `from_pretrained`.
    """
    with atomic_folder(folder, may_replace=_is_dense) as written:
        net.save_pretrained(written)
        text = json.dumps({"mean": list(mean), "std": list(std)}, indent=1)
        (written / PREPROCESSING).write_text(text + "\n", encoding="utf-8")


def load_dense(folder: Path) -> Any:
    """Load a model written by `save_dense`, on the CPU, in evaluation mode.

    Raises:
        ValueError: transformers is not installed, or the folder has no such model.
    """
    check_installed()
    register_backbone()
    from transformers import (  # noqa: PLC0415 - an optional part
        Mask2FormerForUniversalSegmentation,
        RTDetrForObjectDetection,
        UperNetForSemanticSegmentation,
    )

    known: tuple[Any, ...] = (
        Mask2FormerForUniversalSegmentation,
        RTDetrForObjectDetection,
        UperNetForSemanticSegmentation,
    )
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        (model,) = (one for one in known if [one.__name__] == named)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder} has no segmentation or detection model: give the folder of that name in a "
            "finished run."
        ) from None
    return model.from_pretrained(folder).eval()


def flat_output(output: Any) -> Tensor:
    """Return a model's class logits, and masks or boxes, flattened into one tensor."""
    names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    parts = [output[name].float().flatten() for name in names if output.get(name) is not None]
    return torch.cat(parts)


def _is_dense(path: Path) -> bool:
    return (path / PREPROCESSING).is_file()


def count_flops(net: Any, backbone: Any, side: int) -> int:
    """Return the FLOPs of the matrix products in a forward pass over one square image.

    The encoder's are computed from its sizes, the head's counted on a copy on the meta device.
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
    """A stand-in for the encoder that returns feature maps of the right shapes without values."""

    def __init__(self, encoder: SwinV2) -> None:
        super().__init__()
        self.sizes = list(zip(encoder.config.stage_dims, encoder.strides, strict=True))

    def features(self, images: Tensor, drop_path_noise: Tensor | None = None) -> list[Tensor]:
        del drop_path_noise
        count, _, height, width = images.shape
        return [
            images.new_empty(count, dim, -(-height // stride), -(-width // stride))
            for dim, stride in self.sizes
        ]
