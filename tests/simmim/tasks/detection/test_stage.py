import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="needs simmim[finetune]")
pytest.importorskip("pycocotools", reason="needs simmim[finetune]")

from dataclasses import replace

from simmim.cli import main
from simmim.data.datasets.coco import CocoSet
from simmim.data.order.order import Address
from simmim.data.transforms.detection_transforms import TrainDetectionTransform, box_of, mask_of
from simmim.data.transforms.image_transforms import Instances
from simmim.data.transforms.settings import DetectionCropSettings
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import TrainingResult, nonzero, train
from simmim.engine.run import RunFolder
from simmim.export.export import export
from simmim.recipe import parse
from simmim.tasks.detection.heads import Detections
from simmim.tasks.detection.metric import encode_mask, mean_average_precision, results_of
from simmim.tasks.detection.recipe import DetectionRecipe
from simmim.tasks.detection.stage import DetectionStage
from simmim.tasks.segmentation.dense_stage import flat_output, load_dense

SIZE = (40, 56)


def write_objects(folder: Path, count: int) -> None:
    """Write pictures with a red and a blue rectangle, and the COCO file that says where."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 60, (*SIZE, 3), dtype=np.uint8)
        images.append(
            {"id": number + 1, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
        )
        for kind in (0, 1):
            top = int(random.integers(2, 20))
            left = int(random.integers(2, 10)) + 28 * kind
            height, width = 16, 14
            pixels[top : top + height, left : left + width, 2 * kind] += 180
            box = [left, top, width, height]
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 3 + 4 * kind,
                    "iscrowd": 0,
                    "area": height * width,
                    "bbox": box,
                    "segmentation": [corners],
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    categories = [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "objects.json").write_text(json.dumps(content))


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """The values of a detection recipe of seconds."""
    folder = tmp_path / "objects"
    write_objects(folder, 8)
    return {
        "task": "detection",
        "encoder": {
            "variant": "tiny",
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 1, 2, 2],
            "drop_path": 0.0,
        },
        "data": {
            "images": str(folder / "images"),
            "annotations": str(folder / "objects.json"),
            "validation_annotations": str(folder / "objects.json"),
            "image_size": 64,
            "scale": [0.8, 1.2],
            "workers": 0,
            "slots": 4,
        },
        "head": {"channels": 32, "queries": 10, "decoder_layers": 3, "points": 256},
        "pictures": 2,
        "training": {
            "batch_size": 4,
            "steps": 2,
            "log_every": 2,
            "checkpoint_every": 2,
            "validate_every": 2,
            "look_every": 2,
            "trackers": [],
            "optimizer": {"lr": 1e-3},
        },
    }


def build(values: dict[str, Any]) -> DetectionStage:
    return DetectionStage(parse(DetectionRecipe, values, "test"))


def run_training(stage: DetectionStage, folder: Path, resume: str | None = None) -> TrainingResult:
    return train(stage, RunFolder(path=folder), build_accelerator("fp32"), resume)


def changed(values: dict[str, Any], section: str, **settings: Any) -> dict[str, Any]:
    return values | {section: values[section] | settings}


def coco(values: dict[str, Any]) -> CocoSet:
    data = values["data"]
    return CocoSet(data["images"], data["annotations"], only_with_objects=True)


@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_training_resumes_validates_and_draws(
    values: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    values = changed(values, "head", kind=kind)
    values = changed(values, "training", steps=2, checkpoint_every=1)
    whole = build(values)
    result = run_training(whole, tmp_path / "whole")
    assert "box_map" in result.figures
    assert ("mask_map" in result.figures) == (kind == "mask2former")
    assert (tmp_path / "whole" / "reconstructions" / "step-00000002.png").is_file()
    assert (tmp_path / "whole" / "detection" / "model.safetensors").is_file()
    run_training(build(values), tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step-00000002" / "complete").unlink()
    resumed = build(values)
    run_training(resumed, tmp_path / "cut", resume="auto")
    again = resumed.model.state_dict()
    assert all(torch.equal(part, again[name]) for name, part in whole.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "steps"), [("mask2former", 400), ("rt_detr", 1000)])
def test_a_small_set_is_memorised(
    values: dict[str, Any], tmp_path: Path, kind: str, steps: int
) -> None:
    values = changed(values, "head", kind=kind)
    values = changed(values, "data", scale=[1.0, 1.0], flip=0.0)
    values = changed(
        values,
        "training",
        **dict.fromkeys(("steps", "checkpoint_every", "validate_every", "look_every"), steps),
    )
    figures = run_training(build(values), tmp_path / "run").figures
    assert figures["box_map"] >= 80
    if kind == "mask2former":
        assert figures["mask_map"] >= 80


def test_boxes_and_masks_follow_scale_crop_and_flip(values: dict[str, Any]) -> None:
    """What is red is of class 0, what is blue of class 1, wherever a crop puts it."""
    source = coco(values)
    assert source.class_names == ("red", "blue")
    for epoch in range(10):
        data = DetectionCropSettings(image_size=64, scale=(0.7, 1.6))
        transform = TrainDetectionTransform(
            data=data, seed=0, mean=(0.5,) * 3, labels={3: 0, 7: 1}, masks=True
        )
        sample = transform(source.read(0, 1), Address(epoch, 0, 1))
        target = sample.targets
        assert isinstance(target, Instances)
        for label, box, mask in zip(target.labels, target.boxes, target.masks, strict=True):
            assert box.tolist() == box_of(mask.numpy())
            colour = sample.image.float()[:, mask].mean(dim=1)
            assert colour.argmax() == 2 * label
        boxes_only = replace(transform, masks=False)
        other = boxes_only(source.read(0, 1), Address(epoch, 0, 1)).targets
        assert isinstance(other, Instances)
        assert other.masks.shape[1:] == (0, 0)
        for box in target.boxes:
            assert min((box - one).abs().max() for one in other.boxes) < 2.1


def test_ground_truth_as_detections_is_perfect(values: dict[str, Any]) -> None:
    source = coco(values)
    truth = source.ground_truth()
    results = [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": one["bbox"],
            "segmentation": encode_mask(mask_of(one, SIZE)),
            "score": 0.9,
        }
        for one in truth["annotations"]
    ]
    images = [image["id"] for image in truth["images"]]
    assert mean_average_precision(truth, results, images, "bbox")["box_map"] == pytest.approx(100)
    assert mean_average_precision(truth, results, images, "segm")["mask_map"] == pytest.approx(100)


def test_the_metric_is_that_of_pycocotools_on_recorded_predictions(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Predictions with mistakes of every kind, read from a file as pycocotools itself reads it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    source = coco(values)
    truth = source.ground_truth()
    random = np.random.default_rng(0)
    results = []
    for one in truth["annotations"]:
        for _ in range(int(random.integers(0, 3))):
            moved = np.roll(mask_of(one, SIZE), random.integers(-4, 5, 2), (0, 1))
            left, top, right, bottom = box_of(moved)
            results.append(
                {
                    "image_id": one["image_id"],
                    "category_id": int(random.choice([3, 7], p=[0.5, 0.5])),
                    "bbox": [left, top, right - left, bottom - top],
                    "segmentation": encode_mask(moved),
                    "score": float(random.random()),
                }
            )
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    images = [image["id"] for image in truth["images"]]
    for kind, prefix in (("segm", "mask"), ("bbox", "box")):
        reference = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(reference, reference.loadRes(str(tmp_path / "results.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        ours = mean_average_precision(truth, results, images, kind)
        assert ours[f"{prefix}_map"] == pytest.approx(100 * evaluation.stats[0])
        assert ours[f"{prefix}_map50"] == pytest.approx(100 * evaluation.stats[1])
        assert 1 < ours[f"{prefix}_map"] < 99


def test_detections_are_mapped_back_to_image_pixels() -> None:
    logits = torch.full((1, 16, 16), -9.0)
    logits[0, 2:6, 4:12] = 9.0  # of a square of 64: rows 8 to 24, columns 16 to 48
    found = Detections(
        labels=torch.tensor([1]), scores=torch.tensor([0.7]), boxes=None, masks=logits
    )
    (result,) = results_of(found, (5, 64, 128), 64, (3, 7))  # the image was halved
    assert result["category_id"] == 7
    assert result["image_id"] == 5
    assert np.allclose(result["bbox"], [32, 16, 64, 32], atol=4)
    boxes = torch.tensor([[16.0, 8.0, 48.0, 24.0]])
    found = Detections(
        labels=torch.tensor([0]), scores=torch.tensor([0.7]), boxes=boxes, masks=None
    )
    (result,) = results_of(found, (5, 64, 128), 64, (3, 7))
    assert result["bbox"] == [32, 16, 64, 32]


def test_objects_without_masks_are_for_box_detectors_only(values: dict[str, Any]) -> None:
    file = Path(values["data"]["annotations"])
    content = json.loads(file.read_text())
    del content["annotations"][0]["segmentation"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1 object of .* no segmentation"):
        build(values)
    assert build(changed(values, "head", kind="rt_detr")).order.samples_per_epoch == 8


def test_images_of_another_size_are_named(values: dict[str, Any]) -> None:
    file = Path(values["data"]["images"]) / "3.png"
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(file)
    stage = build(changed(values, "data", max_bad_share=0.0))
    with pytest.raises(ValueError, match=r"56x40 pixels, the image 8x8"):
        list(stage.batches(rank=0, world=1, start=0, end=8))


@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_a_batch_without_objects_has_a_loss(values: dict[str, Any], kind: str) -> None:
    stage = build(changed(values, "head", kind=kind))
    nothing = Instances(
        labels=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
        masks=torch.zeros(0, 64, 64, dtype=torch.bool),
        image=torch.tensor([1, 64, 64]),
    )
    model, targets = stage.model.train(), [nothing, nothing]
    normalisers = nonzero(model.normalisers(targets))
    images = torch.randn(2, 3, 64, 64)
    loss = model.loss(images, targets, seeds=[0, 1], normalisers=normalisers)
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_encoder_and_head_of_an_unfinished_run_are_exported(
    values: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    stage = build(changed(values, "head", kind=kind))
    run_training(stage, tmp_path / "run")
    for name in ("encoder", "detection"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    export(tmp_path / "run", tmp_path / "out", "native")
    ours, theirs = stage.model.net.eval(), load_dense(tmp_path / "out" / "detection")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = ours(pixel_values=images), theirs(pixel_values=images)
    torch.testing.assert_close(flat_output(expected), flat_output(found))
    assert theirs.config.id2label == {0: "red", 1: "blue"}


def test_the_metric_takes_annotations_by_any_id(values: dict[str, Any]) -> None:
    file = Path(values["data"]["annotations"])
    content = json.loads(file.read_text())
    for number, one in enumerate(content["annotations"]):
        one["id"] = number  # 0 stands for "not found" where the metric keeps its matches
    content["annotations"][5].pop("id")
    file.write_text(json.dumps(content))
    found = CocoSet(values["data"]["images"], file, only_with_objects=False)
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"]}
        | {"score": 0.9, "segmentation": encode_mask(mask_of(one, SIZE))}
        for one in content["annotations"]
    ]
    images = [image["id"] for image in content["images"]]
    for kind in ("bbox", "segm"):
        figures = mean_average_precision(found.ground_truth(), results, images, kind)  # type: ignore[arg-type]
        assert min(figures.values()) == pytest.approx(100)


def test_validation_without_masks_is_refused_before_training(values: dict[str, Any]) -> None:
    file = Path(values["data"]["annotations"])
    content = json.loads(file.read_text())
    content["annotations"][3].pop("segmentation")
    other = file.with_name("others.json")
    other.write_text(json.dumps(content))
    validated = changed(values, "data", validation_annotations=str(other))
    with pytest.raises(ValueError, match=r"1 object of .*others\.json has no segmentation"):
        build(validated)
    assert build(changed(validated, "head", kind="rt_detr")).watch.best_metric == "box_map"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_two_processes_train_in_shards(
    values: dict[str, Any],
    tmp_path: Path,
    kind: str,
    train_in_shards: Callable[..., list[dict[str, Any]]],
) -> None:
    channels = 32 if kind == "rt_detr" else values["head"]["channels"]
    lines = train_in_shards(changed(values, "head", kind=kind, channels=channels), tmp_path / "run")
    assert "box_map" in lines[-1]


def test_without_detections_every_figure_is_0(values: dict[str, Any]) -> None:
    truth = coco(values).ground_truth()
    images = [image["id"] for image in truth["images"]]
    figures = mean_average_precision(truth, [], images, "bbox")
    assert {"box_map", "box_map50", "box_map75", "box_map_small"} <= set(figures)
    assert set(figures.values()) == {0.0}


def test_evaluate_takes_other_images_and_annotations(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = changed(values, "head", kind="rt_detr", decoder_layers=1)
    values = changed(values, "training", steps=1, checkpoint_every=1)
    del values["data"]["validation_annotations"]
    run_training(build(values), tmp_path / "run")
    write_objects(tmp_path / "others", 3)
    images, file = tmp_path / "others" / "images", tmp_path / "others" / "objects.json"
    evaluation = ["evaluate", str(tmp_path / "run")]
    for more in ([], ["--data", str(images)]):
        assert main([*evaluation, *more]) == 2
        assert "--data.validation_annotations" in capsys.readouterr().err
    named = ["--data.validation_annotations", str(file)]
    assert main([*evaluation, "--data", str(images), *named]) == 0
    assert "box_map" in capsys.readouterr().out
    assert main([*evaluation, "--data", str(file), "--data.validation_images", str(images)]) == 0
