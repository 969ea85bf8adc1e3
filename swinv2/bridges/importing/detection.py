"""Detect the format of a checkpoint by its files and the names of its tensors."""

import re
from pathlib import Path
from typing import Literal

from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.importing.mmpretrain import MARK
from swinv2.bridges.importing.reading import WeightsChoice, read_checkpoint
from swinv2.json_file import load_json

Library = Literal["reference", "timm", "transformers", "torchvision", "mmpretrain"]

_WEIGHT_FILES = ("checkpoint.pth", "model.safetensors", "pytorch_model.bin")
_MERGING = re.compile(r"layers[._](\d+)\.downsample\.")


def detect_library(
    path: Path, *, weights: WeightsChoice | None = None, key: str | None = None
) -> Library | None:
    """Return the library whose layout a file or folder has; None if it has none of them.

    Args:
        path: a file, or a folder from an export or a model hub.
        weights: averaged or raw weights.
        key: one of several models in the file.

    Raises:
        BridgeError: its weights cannot be read.
    """
    if path.is_dir():
        described = _describes(path / "config.json")
        if described is not None:
            return described
        file = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
        return None if file is None else detect_library(file, weights=weights, key=key)
    return _library_of(list(read_checkpoint(path, weights=weights, key=key).tensors))


def _describes(file: Path) -> Library | None:
    """Return the library whose `config.json` this is."""
    try:
        content = load_json(file)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    if "model_type" in content:
        return "transformers"
    return "timm" if str(content.get("architecture", "")).startswith("swinv2_") else None


def _library_of(names: list[str]) -> Library | None:
    if not any(name.endswith("logit_scale") for name in names):
        return None
    if any(MARK in name for name in names):
        return "mmpretrain"
    if any(name.startswith("features.") for name in names):
        return "torchvision"
    if any(".attention.self." in name for name in names):
        return "transformers"
    if not any(name.startswith(("layers", "encoder.layers.")) for name in names):
        return None
    merged = {int(match[1]) for name in names if (match := _MERGING.search(name))}
    flat = any(name.startswith("layers_") for name in names)
    is_timm = flat or "head.fc.weight" in names or (merged and 0 not in merged)
    return "timm" if is_timm else "reference"


def require_library(
    path: Path, *, weights: WeightsChoice | None = None, key: str | None = None
) -> Library:
    """Return the library of a checkpoint; see `detect_library`.

    Raises:
        BridgeError: it is of none of them.
    """
    found = detect_library(path, weights=weights, key=key)
    if found is None:
        raise BridgeError(
            f"{path} has the layout of no known library (the published code, timm, transformers, "
            "torchvision, mmpretrain): give a checkpoint of a Swin Transformer V2, or its --format."
        )
    return found
