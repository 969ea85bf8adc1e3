"""Pictures during training: of images of more than 8 bits, and where nothing is held out."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data.loader.batch import Batch
from simmim.engine.devices import build_accelerator
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.detection.recipe import DetectionRecipe
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.segmentation.overlays import picture_of, square_picture_of
from simmim.tasks.segmentation.recipe import SegmentationRecipe

SIDE = 32


def scene(number: int, bands: int) -> np.ndarray:
    """A bright square on a dark ground of 16 bits that fills a hundredth of the range."""
    rng = np.random.default_rng(number)
    values = rng.integers(100, 200, (SIDE, SIDE, bands), dtype=np.uint16)
    values[8:24, 8:24] += np.arange(300, 300 + 40 * bands, 40, dtype=np.uint16)
    return values


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "training"
    folder.mkdir(parents=True)
    for number in range(6):
        np.save(folder / f"{number}.npy", scene(number, 5))
    return folder


def five_bands(values: dict[str, Any]) -> dict[str, Any]:
    values["encoder"] |= {"in_channels": 5}
    values["data"] |= {"mean": [0.005] * 5, "std": [0.002] * 5}
    return values


def first_tile(path: Path) -> np.ndarray:
    with Image.open(path) as panel:
        return np.asarray(panel)[22:150, 4:132].astype(float)


def test_reconstructions_of_many_bands_are_visible_though_nothing_is_held_out(
    pretrain_values: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    values = five_bands(pretrain_values)
    values["data"] |= {"shards": str(images), "validation_shards": 0, "image_size": SIDE}
    shown = {}
    for name, bands in (("default", None), ("chosen", [4, 2, 0]), ("grey", [3])):
        values["data"]["picture_bands"] = bands
        stage = PretrainStage(parse(PretrainRecipe, values, "test"))
        run = RunFolder(path=tmp_path / name)
        path = stage.visualize(build_accelerator("fp32"), run, 1)
        assert path is not None
        shown[name] = first_tile(path)
    for tile in shown.values():
        assert tile.min() < 5
        assert tile.max() > 250
        assert 50 < tile.mean() < 200
    assert np.ptp(shown["grey"], axis=2).max() == 0
    assert np.abs(shown["default"] - shown["chosen"]).max() > 10


def test_bands_that_images_do_not_have_are_refused(pretrain_values: dict[str, Any]) -> None:
    for bands, message in (
        ([0, 1, 3], r"picture_bands is \[0, 1, 3\], and the images have 3 channels"),
        ([0, 1], "give three channels"),
        ([-1], "picture_bands.0 is -1; it must be 0 or more"),
        ([], "give three channels"),
    ):
        pretrain_values["data"]["picture_bands"] = bands
        with pytest.raises(ValueError, match=message):
            parse(PretrainRecipe, pretrain_values, "test")


@pytest.mark.parametrize("bands", [None, (4, 3, 2), (1,)])
def test_pictures_under_labels_are_stretched(bands: tuple[int, ...] | None) -> None:
    stored = torch.from_numpy(scene(0, 5).transpose(2, 0, 1).copy())[None]
    batch = Batch(
        addresses=torch.zeros(1, 3, dtype=torch.int64), images=stored, masks=None, labels=None
    )
    for picture in (
        picture_of(batch, 0, (SIDE, SIDE), bands),
        square_picture_of(batch, 0, (SIDE, SIDE), bands),
    ):
        assert picture[:4].mean() < 60
        assert picture[12:20, 12:20].mean() > 190


def test_pictures_show_images_spread_over_the_set(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(40):
        grey = np.full((SIDE, SIDE, 3), 6 * number, dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / "images" / f"{number:02}.png")
    pretrain_values["data"] |= {"shards": str(tmp_path / "images"), "image_size": SIDE}
    for held_out in (0, 1):
        pretrain_values["data"]["validation_shards"] = 2 * held_out
        stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
        source = stage.validation_shards if held_out else stage.training_shards
        places = [(shard, row) for shard, size in enumerate(source.sizes) for row in range(size)]
        assert source.spread(3) == [places[0], places[(len(places) - 1) // 2], places[-1]]
        assert source.spread(1000) == places
        run = RunFolder(path=tmp_path / str(held_out))
        paths = [stage.visualize(build_accelerator("fp32"), run, step) for step in (1, 2)]
        assert all(paths)
        first, second = (np.asarray(Image.open(str(path))) for path in paths)
        assert np.array_equal(first, second)
        drawn = [first[60 + 132 * row, 60 + 540 * block, 0] for block in (0, 1) for row in range(4)]
        shown = source.spread(8)
        grey = [
            np.asarray(Image.open(io.BytesIO(source.read(*one).image)))[0, 0, 0] for one in shown
        ]
        assert drawn == grey


DENSE = {
    "encoder": {
        "variant": "tiny",
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 8,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 1, 2, 2],
    },
    "training": {"batch_size": 2, "steps": 1, "optimizer": {"lr": 1e-3}},
}


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_dense_tasks_draw_training_images_of_many_bands_if_nothing_is_held_out(
    images: Path, tmp_path: Path, task: str
) -> None:
    pytest.importorskip("transformers")
    values = five_bands({name: dict(section) for name, section in DENSE.items()} | {"data": {}})
    values |= {"task": task, "pictures": 2}
    values["data"] |= {"image_size": SIDE, "workers": 0, "picture_bands": [4, 2, 0]}
    if task == "segmentation":
        labels = np.zeros((SIDE, SIDE), dtype=np.uint8)
        labels[8:24, 8:24] = 1
        for number in range(6):
            path = tmp_path / "annotations" / "training" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
        values["data"] |= {"folder": str(tmp_path), "num_classes": 2, "validation": None}
        values["head"] = {"channels": 8, "auxiliary_channels": 8}
        from simmim.tasks.segmentation.stage import SegmentationStage

        stage: Any = SegmentationStage(parse(SegmentationRecipe, values, "test"))
    else:
        pytest.importorskip("pycocotools")
        content = {
            "images": [
                {"id": n, "file_name": f"{n}.npy", "height": SIDE, "width": SIDE} for n in range(6)
            ],
            "annotations": [
                {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [8, 8, 16, 16], "area": 256}
                | {"iscrowd": 0}
                for n in range(6)
            ],
            "categories": [{"id": 1, "name": "square"}],
        }
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        values["data"] |= {"images": str(images), "annotations": str(tmp_path / "boxes.json")}
        values["head"] = {"kind": "rt_detr", "channels": 32, "queries": 6, "decoder_layers": 1}
        from simmim.tasks.detection.stage import DetectionStage

        stage = DetectionStage(parse(DetectionRecipe, values, "test"))
    drawn = [batch.addresses[:, 2].tolist() for batch in stage.pictured_batches(at_a_time=2)]
    assert drawn == [[0, 5]]
    path = stage.visualize(build_accelerator("fp32"), RunFolder(path=tmp_path / "run"), 1)
    assert path is not None
    with Image.open(path) as panel:
        tile = np.asarray(panel)[20 : 20 + SIDE, 6 : 6 + SIDE].astype(float)
    assert tile[14:18, 14:18].mean() > 150
    assert tile[:4, :4].mean() < 100
