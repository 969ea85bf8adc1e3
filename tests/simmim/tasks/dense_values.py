"""Small recipes of segmentation and detection, with images to train on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HEADS: dict[str, dict[str, Any]] = {
    "upernet": {"channels": 8, "auxiliary_channels": 8},
    "mask2former": {"channels": 32, "queries": 6, "decoder_layers": 3, "points": 64},
    "rt_detr": {"channels": 32, "queries": 6, "decoder_layers": 3},
}


def dense_values(folder: Path, encoder: dict[str, Any], task: str, kind: str) -> dict[str, Any]:
    """Write 16 images with classes of pixels and objects; return the recipe of a head on them.

    Args:
        folder: where to write.
        encoder: its section of a recipe.
        task: segmentation or detection.
        kind: kind of head.
    """
    pytest.importorskip("transformers", reason="needs simmim[finetune]")
    pytest.importorskip("pycocotools", reason="needs simmim[finetune]")
    random = np.random.default_rng(0)
    for number in range(16):
        for kind_of_file, shape in (("images", (32, 32, 3)), ("annotations", (32, 32))):
            file = folder / "scenes" / kind_of_file / "training" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 3, shape, dtype=np.uint8)).save(file)
    data: dict[str, Any] = {"image_size": 32, "workers": 0}
    if task == "segmentation":
        data |= {"folder": str(folder / "scenes"), "validation": None}
        data |= {"num_classes": 3, "largest_class": 1.0}
    else:
        write_objects(folder / "objects.json")
        data |= {"images": str(folder / "scenes/images/training"), "scale": [1.0, 1.0]}
        data |= {"annotations": str(folder / "objects.json")}
    sizes = {"depths": [1] * 4, "num_heads": [1, 2, 2, 2], "window_size": 4, "patch_size": 2}
    return {
        "task": task,
        "encoder": encoder | sizes,
        "data": data,
        "head": {"kind": kind} | HEADS[kind],
        "training": {"batch_size": 4, "steps": 2, "optimizer": {"lr": 1e-3}},
    }


def write_objects(path: Path) -> None:
    """Write COCO's file of 16 images with one or two objects each."""
    images = [
        {"id": number, "file_name": f"{number}.png", "height": 32, "width": 32}
        for number in range(16)
    ]
    shape = {"bbox": [4, 4, 16, 20], "segmentation": [[4, 4, 20, 4, 20, 24, 4, 24]]}
    annotations = [
        {"id": 1 + number, "image_id": number % 16, "category_id": 1, "iscrowd": 0} | shape
        for number in range(24)
    ]
    categories = [{"id": 1, "name": "one"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
