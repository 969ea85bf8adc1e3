"""One optimiser step on the same batch: the same loss and gradient however it is cut.

Accumulated in one process or spread over several. Batch norms, which see one micro-batch of one
process, are left out; jobs/README.md says so.
"""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from tests.simmim.forked import finish

pytest.importorskip("transformers", reason="needs simmim[finetune]")
pytest.importorskip("pycocotools", reason="needs simmim[finetune]")

SIZE, BATCH = 32, 8
ENCODER = {
    "variant": "tiny",
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "drop_path": 0.2,
}
ROUNDING = 2e-5
PROGRAM = Path(__file__).with_name("step_losses.py")
step = runpy.run_path(str(PROGRAM))["step"]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Images whose numbers of labelled pixels, of classes and of objects differ, some of them 0."""
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(BATCH):
        pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        classes = np.full((SIZE, SIZE), 255, dtype=np.uint8)
        for kind in range(number % 4):  # 0, 1, 2, 3 stripes; the rest is ignored
            classes[:, 4 * kind : 4 * kind + 1 + number] = kind
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE, "width": SIZE})
        for _ in range(1 + 2 * (number % 3)):
            left, top, width, height = (int(one) for one in random.integers(4, 15, 4))
            right, bottom = left + width, top + height
            corners = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1 + number % 2}
                | {"bbox": [left, top, width, height], "segmentation": [corners], "iscrowd": 0}
            )
        for folder, array in (("images", pixels), ("annotations", classes)):
            file = tmp_path / "scenes" / folder / "training" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "objects.json").write_text(json.dumps(content))
    return tmp_path


def heads(scenes: Path) -> dict[str, dict[str, Any]]:
    """Return the recipes of dense heads by name."""
    training = {"batch_size": BATCH, "steps": 1, "optimizer": {"lr": 1e-3}}
    common = {"encoder": ENCODER, "training": training}
    data = {"image_size": SIZE, "workers": 0, "slots": 4, "scale": [1.0, 1.0]}
    maps = data | {"folder": str(scenes / "scenes"), "validation": None, "num_classes": 3}
    segmentation = common | {"task": "segmentation", "data": maps | {"largest_class": 1.0}}
    coco = {"images": str(scenes / "scenes/images/training")}
    coco["annotations"] = str(scenes / "objects.json")
    detection = common | {"task": "detection", "data": data | coco}
    masks = {"kind": "mask2former", "channels": 32, "queries": 6, "decoder_layers": 3, "points": 64}
    boxes = {"kind": "rt_detr", "channels": 32, "queries": 6, "decoder_layers": 2}
    return {
        "upernet": segmentation | {"head": {"channels": 8, "auxiliary_channels": 8}},
        "mask2former": segmentation | {"head": masks},
        "instances": detection | {"head": masks},
        "rt_detr": detection | {"head": boxes},
    }


Measure = Callable[[dict[str, Any], list[int], int], dict[str, dict[str, float]]]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Take the step of recipes with these accumulations, on so many processes."""

    def on(
        recipes: dict[str, Any], accumulations: list[int], processes: int
    ) -> dict[str, dict[str, float]]:
        if processes == 1:
            accelerator = Accelerator(cpu=True)
            return {
                f"{name}/{accumulation}": step(one, accumulation, accelerator)
                for name, one in recipes.items()
                for accumulation in accumulations
            }
        file = tmp_path / "recipes.json"
        file.write_text(json.dumps({name: [one, accumulations] for name, one in recipes.items()}))
        text = finish([str(PROGRAM), str(file)], tmp_path / "log", processes)
        (line,) = [line for line in text.splitlines() if line.startswith("{")]
        found: dict[str, dict[str, float]] = json.loads(line)
        return found

    return on


def assert_same(found: dict[str, dict[str, float]], names: list[str]) -> None:
    for name in names:
        (reference, *others) = (one for key, one in found.items() if key.startswith(f"{name}/"))
        assert others
        scale = reference["norm"]
        for other in others:
            assert other["loss"] == pytest.approx(reference["loss"], rel=ROUNDING)
            for value in ("norm", "sines", "cosines"):
                assert other[value] == pytest.approx(reference[value], abs=1e-3 * scale), name


@pytest.mark.timeout(400)
def test_dense_heads_have_one_loss_on_any_processes_and_accumulation(
    scenes: Path, measure: Measure
) -> None:
    recipes = heads(scenes)
    found = measure(recipes, [1], 1)
    found |= {f"{name} on two": one for name, one in measure(recipes, [2], 2).items()}
    assert_same(found, list(recipes))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_task_has_one_loss_on_up_to_four_processes(
    scenes: Path,
    measure: Measure,
    pretrain_values: dict[str, Any],
    classification_values: dict[str, Any],
) -> None:
    mixed = {"augmentation": {"mixup": 0.8, "cutmix": 1.0}}
    small = {"training": classification_values["training"] | {"batch_size": BATCH}}
    recipes = heads(scenes) | {
        "pretrain": pretrain_values,
        "classification": classification_values | small,
        "mixed": classification_values | mixed | {"training": small["training"]},
    }
    recipes["mixed"]["training"] = recipes["mixed"]["training"] | {"batch_size": 16}
    found = measure(recipes, [1, 2, 4], 1)
    for processes, accumulations in ((2, [1, 2, 4]), (4, [1, 2])):
        cut = measure(recipes, accumulations, processes)
        found |= {f"{name} on {processes}": one for name, one in cut.items()}
    assert_same(found, list(recipes))
