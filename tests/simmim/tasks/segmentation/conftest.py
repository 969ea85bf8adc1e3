"""A tiny set of street scenes: stripes of classes, and objects in COCO's format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLOURS = np.array([[40, 80, 200], [60, 160, 60], [200, 60, 40]], dtype=np.uint8)


def draw_scene(number: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """Return the classes of a picture: a rectangle of class 2 on halves of classes 0 and 1."""
    random = np.random.default_rng(number)
    classes = np.zeros(size, dtype=np.uint8)
    classes[size[0] // 2 :] = 1
    top, left = random.integers(4, 16), random.integers(4, 30)
    classes[top : top + 14, left : left + 18] = 2
    return classes


def write_scenes(folder: Path, split: str, count: int, *, none: int = 255) -> None:
    """Write scenes with their labels; the first column of each stands for no class."""
    for number in range(count):
        classes = draw_scene(number)
        noise = np.random.default_rng(100 + number).integers(0, 30, (*classes.shape, 3))
        for kind, pixels in (
            ("images", COLOURS[classes] + noise.astype(np.uint8)),
            ("annotations", np.where(np.arange(classes.shape[1]) == 0, none, classes)),
        ):
            path = folder / kind / split / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


def coco_of(folder: Path, split: str) -> dict[str, Any]:
    """Return the rectangles of the scenes in COCO's format: class 2 is category 7."""
    images, annotations = [], []
    for number, file in enumerate(sorted((folder / "images" / split).iterdir())):
        classes = draw_scene(number)
        height, width = classes.shape
        images.append({"id": number + 1, "file_name": file.name, "height": height, "width": width})
        rows, columns = np.nonzero(classes == 2)
        left, top = int(columns.min()), int(rows.min())
        right, bottom = int(columns.max()) + 1, int(rows.max()) + 1
        annotations.append(
            {
                "id": number + 1,
                "image_id": number + 1,
                "category_id": 7,
                "iscrowd": 0,
                "area": (right - left) * (bottom - top),
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
            }
        )
    categories = [{"id": 3, "name": "nothing"}, {"id": 7, "name": "box"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder of eight scenes to train on and four to validate on, with COCO files."""
    for split, count in (("training", 8), ("validation", 4)):
        write_scenes(tmp_path, split, count)
        (tmp_path / f"{split}.json").write_text(json.dumps(coco_of(tmp_path, split)))
    return tmp_path
