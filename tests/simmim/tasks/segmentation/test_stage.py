import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simmim.cli import main
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import TrainingResult, train
from simmim.engine.optimizer import Layers
from simmim.engine.run import RunFolder
from simmim.export.export import export
from simmim.recipe import RecipeError, parse
from simmim.tasks.segmentation.dense_stage import flat_output, load_dense
from simmim.tasks.segmentation.recipe import SegmentationRecipe
from simmim.tasks.segmentation.stage import SegmentationStage
from swinv2.weights import load_encoder
from tests.simmim.forked import finish

pytest.importorskip("transformers", reason="needs simmim[finetune]")

CLASSES, SIZE = 3, (40, 56)
COLOURS = np.array([[40, 80, 200], [60, 160, 60], [200, 60, 40]], dtype=np.uint8)


def write_scenes(folder: Path, split: str, count: int) -> None:
    """Write rectangles of class 2 on halves of classes 0 and 1; the colour tells the class."""
    for number in range(count):
        random = np.random.default_rng(number)
        classes = np.zeros(SIZE, dtype=np.uint8)
        classes[20:] = 1
        top, left = random.integers(4, 16), random.integers(4, 30)
        classes[top : top + 14, left : left + 18] = 2
        noise = random.integers(0, 30, (*SIZE, 3), dtype=np.uint8)
        for kind, pixels in (("images", COLOURS[classes] + noise), ("annotations", classes)):
            path = folder / kind / split / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """The values of a segmentation recipe of seconds."""
    for split, count in (("training", 8), ("validation", 3)):
        write_scenes(tmp_path / "scenes", split, count)
    return {
        "task": "segmentation",
        "encoder": {
            "variant": "tiny",
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 8,
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 1, 2, 2],
            "drop_path": 0.1,
        },
        "data": {
            "folder": str(tmp_path / "scenes"),
            "num_classes": CLASSES,
            "class_names": ["sky", "ground", "box"],
            "image_size": 32,
            "workers": 0,
            "slots": 4,
        },
        "head": {"channels": 8, "auxiliary_channels": 8, "queries": 6, "points": 32}
        | {"decoder_layers": 2},
        "pictures": 2,
        "training": {
            "batch_size": 4,
            "steps": 4,
            "log_every": 2,
            "checkpoint_every": 2,
            "validate_every": 4,
            "look_every": 4,
            "trackers": [],
            "optimizer": {"lr": 2e-3, "layer_decay": 0.8},
        },
    }


def build(values: dict[str, Any]) -> SegmentationStage:
    return SegmentationStage(parse(SegmentationRecipe, values, "test"))


def run_training(
    stage: SegmentationStage, folder: Path, resume: str | None = None
) -> TrainingResult:
    return train(stage, RunFolder(path=folder), build_accelerator("fp32"), resume)


def changed(values: dict[str, Any], section: str, **settings: Any) -> dict[str, Any]:
    return values | {section: values[section] | settings}


@pytest.mark.parametrize("freeze", [2, "all"])
def test_a_frozen_encoder_stays_as_it_is(
    values: dict[str, Any], tmp_path: Path, freeze: int | str
) -> None:
    optimizer = values["training"]["optimizer"] | {"freeze": freeze}
    stage = build(changed(values, "training", optimizer=optimizer))
    before = {name: part.clone() for name, part in stage.module.state_dict().items()}
    run_training(stage, tmp_path / "run")
    after = stage.module.state_dict()
    frozen = {name for name, one in stage.module.named_parameters() if not one.requires_grad}
    trained = set(dict(stage.module.named_parameters())) - frozen
    assert frozen == {name for name in frozen if torch.equal(before[name], after[name])}
    assert any(not torch.equal(before[name], after[name]) for name in trained)
    stage.module.train()
    assert stage.encoder.training == (freeze != "all")
    assert len([name for name in frozen if ".encoder." in name]) == len(frozen) > 20


def test_training_learns_and_exports_everything(values: dict[str, Any], tmp_path: Path) -> None:
    stage = build(changed(values, "training", steps=40, validate_every=40, look_every=40))
    result = run_training(stage, tmp_path / "run")
    assert result.figures["miou"] > 50
    assert set(result.figures) >= {"iou/sky", "iou/ground", "iou/box", "pixel_accuracy"}
    with Image.open(tmp_path / "run" / "reconstructions" / "step-00000040.png") as panel:
        assert panel.width >= 3 * SIZE[1]
        assert panel.height >= 2 * SIZE[0]
    from transformers import UperNetForSemanticSegmentation

    from swinv2.bridges.transformers_backbone import register_backbone

    register_backbone()
    folder = tmp_path / "run" / "segmentation"
    loaded = UperNetForSemanticSegmentation.from_pretrained(folder).eval()
    assert loaded.config.id2label == {0: "sky", 1: "ground", 2: "box"}
    described = json.loads((folder / "preprocessing.json").read_text())
    assert described["mean"][0] == 0.485
    assert described["channels"] == ["red", "green", "blue"]
    images = torch.randn(1, 3, 32, 48)
    stage.model.eval()
    with torch.no_grad():
        theirs = loaded(images).logits.softmax(dim=1)
        torch.testing.assert_close(stage.model.scores(images), theirs)
        encoder = load_encoder(tmp_path / "run" / "encoder")
        torch.testing.assert_close(
            encoder.features(images)[1], stage.model.backbone.encoder.features(images)[1]
        )


@pytest.mark.timeout(900)  # two trainings in processes of their own
def test_few_labels_are_compared_by_its_metric(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, finish(command[1:], tmp_path / "log"))

    monkeypatch.setattr("simmim.tasks.label_efficiency.subprocess", SimpleNamespace(run=run))
    values = changed(values, "training", steps=2, validate_every=2) | {"pictures": 0}
    config, folder = tmp_path / "scenes.yaml", tmp_path / "labels"
    config.write_text(yaml.safe_dump(values))
    run_training(build(values), tmp_path / "before")
    command = ["labels", "--config", str(config), "--init", str(tmp_path / "before")]
    assert main([*command, "--folder", str(folder), "--fractions", "0.5", "--seeds", "3"]) == 0
    assert "pretrained, mIoU %" in capsys.readouterr().out
    for one in json.loads((folder / "labels.json").read_text()):
        run = RunFolder(path=folder / f"{one['start']}-50-seed3")
        assert one["values"] == [line["miou"] for line in run.read_metrics() if "miou" in line]
        assert yaml.safe_load((run.path / "recipe.yaml").read_text())["data"]["fraction"] == 0.5
    assert "mIoU %" in (folder / "labels.html").read_text()


@pytest.mark.parametrize("kind", ["upernet", "mask2former"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    values: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    values = changed(values, "head", kind=kind, channels=32)
    whole = build(values)
    run_training(whole, tmp_path / "whole")
    run_training(build(values), tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step-00000004" / "complete").unlink()
    resumed = build(values)
    run_training(resumed, tmp_path / "cut", resume="auto")
    again = resumed.model.state_dict()
    assert all(torch.equal(part, again[name]) for name, part in whole.model.state_dict().items())


def test_an_encoder_directory_brings_its_weights(values: dict[str, Any], tmp_path: Path) -> None:
    run_training(build(changed(values, "training", steps=2)), tmp_path / "first")
    start = tmp_path / "first" / "encoder"
    wider = changed(changed(values, "encoder", window_size=8), "data", image_size=64)
    others = {"variant": "base", "window_size": 8, "drop_path": 0.1}
    stage = build(wider | {"init": str(start), "encoder": others})
    assert stage.recipe.encoder == replace(build(wider).recipe.encoder, variant="base")
    inside, saved = stage.model.backbone.encoder.state_dict(), load_encoder(start).state_dict()
    assert all(torch.equal(part, saved[name]) for name, part in inside.items())
    norm = stage.model.backbone.hidden_states_norms["stage4"].state_dict()
    assert all(torch.equal(norm[leaf], saved[f"norm.{leaf}"]) for leaf in norm)
    config = stage.model.backbone.encoder.config
    assert config.window_size == (8, 8)
    assert config.pretrained_window_sizes == ((4, 4), (4, 4), (4, 4), (2, 2))


def test_every_parameter_has_the_layer_it_should(values: dict[str, Any]) -> None:
    stage = build(values)
    layers, encoder = Layers.of(stage.module), stage.initial.encoder
    own = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    for name, _ in stage.module.named_parameters():
        inner = name.partition("backbone.encoder.")[2]
        assert layers.layer_of(name) == (own[inner] if inner else sum((1, 1, 2, 1)) + 1), name


def test_drop_path_depends_on_the_sample(values: dict[str, Any]) -> None:
    stage = build(changed(values, "encoder", drop_path=0.5))
    for norm in stage.module.modules():
        if isinstance(norm, torch.nn.LayerNorm):
            torch.nn.init.normal_(norm.weight)
    batch = next(iter(stage.batches(rank=0, world=1, start=0, end=4)))
    stage.module.train()
    torch.manual_seed(1)
    first = stage.module(batch)
    torch.manual_seed(2)
    assert torch.equal(stage.module(batch), first)


def test_evaluation_windows_are_restored(values: dict[str, Any]) -> None:
    evaluation = {"mode": "slide", "size": 48, "window_size": 6, "scales": [1.0, 1.5], "flip": True}
    stage = build(values | {"evaluation": evaluation})
    stage.module.eval()
    windows = stage.model.backbone.encoder.config.window_size
    figures = stage.validate(build_accelerator("fp32"))
    assert 0 <= figures["miou"] <= 100
    assert stage.model.backbone.encoder.config.window_size == windows


def test_labels_of_another_size_are_replaced_and_counted(values: dict[str, Any]) -> None:
    file = Path(values["data"]["folder"]) / "annotations" / "training" / "003.png"
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(file)
    stage = build(values)
    batches = list(stage.batches(rank=0, world=1, start=0, end=8))
    assert sum(len(batch) for batch in batches) == 8
    assert stage.bad_samples.bad == 1
    strict = build(changed(values, "data", max_bad_share=0.0))
    with pytest.raises(ValueError, match="8x8 pixels, the image 56x40"):
        list(strict.batches(rank=0, world=1, start=0, end=8))


def test_a_class_out_of_range_ends_the_run(values: dict[str, Any]) -> None:
    values = changed(values, "data", num_classes=2, class_names=["a", "b"])
    wrong = r"training/00\d: .* contains 2, which is not a class"
    with pytest.raises(ValueError, match=wrong):
        build(values)  # the first label map is read before training starts
    for split in ("training", "validation"):
        first = Path(values["data"]["folder"]) / "annotations" / split / "000.png"
        Image.fromarray(np.zeros(SIZE, dtype=np.uint8)).save(first)
    with pytest.raises(ValueError, match=wrong):
        list(build(values).batches(rank=0, world=1, start=0, end=8))


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("data", {"num_classes": 256}, "num_classes is 256"),
        ("data", {"num_classes": 1}, "num_classes is 1; it must be from 2 to 255"),
        ("data", {"class_names": ["a"]}, "num_classes is 3, .*class_names.* 1;"),
        ("data", {"slots": 3}, "multiple of data.slots 3"),
        ("data", {"scale": [0.0, 1.0]}, "scale is"),
        ("head", {"kind": "fcn"}, "head.kind"),
        ("head", {"kind": "mask2former"}, "channels is 8; .*multiple of 32"),
        ("head", {"auxiliary_weight": -1}, "auxiliary_weight is -1"),
    ],
)
def test_impossible_recipes_are_refused(
    values: dict[str, Any], section: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(SegmentationRecipe, changed(values, section, **settings), "test")


def test_a_finished_run_can_be_started_from(values: dict[str, Any], tmp_path: Path) -> None:
    run_training(build(changed(values, "training", steps=2)), tmp_path / "first")
    stage = build(values | {"init": str(tmp_path / "first")})
    saved = load_encoder(tmp_path / "first" / "encoder").state_dict()
    inside = stage.model.backbone.encoder.state_dict()
    assert all(torch.equal(part, saved[name]) for name, part in inside.items())


@pytest.mark.parametrize("kind", ["upernet", "mask2former"])
def test_encoder_and_head_of_any_checkpoint_are_exported(
    values: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    values = changed(values, "head", kind=kind, channels=32)
    stage = build(changed(values, "training", keep_best=True))
    run_training(stage, run)
    images = torch.randn(1, 3, 32, 32)

    def check_answers() -> None:
        lines = export(run, out, "native", best=True)
        assert "  segmentation: encoder and head, for transformers" in lines
        features = load_encoder(out).features(images)[1]
        ours, theirs = stage.model.net.eval(), load_dense(out / "segmentation")
        assert type(theirs) is type(ours)
        with torch.no_grad():
            same = flat_output(ours(pixel_values=images)), flat_output(theirs(pixel_values=images))
            assert torch.equal(features, stage.model.backbone.encoder.features(images)[1])
        torch.testing.assert_close(*same)

    check_answers()  # what the run has handed on
    lines = export(out, tmp_path / "again", "native")
    assert "  segmentation: encoder and head, for transformers" in lines
    (run / "encoder").rename(tmp_path / "first")
    Path(values["data"]["folder"]).rename(tmp_path / "gone")
    check_answers()  # the checkpoint alone
    earlier = run / "checkpoints" / "step-00000002"
    export(earlier, out, "native")
    kept = read_model(earlier)
    encoder = load_encoder(out).state_dict()
    (name,) = (name for name in kept if name.endswith("encoder.patch_embed.norm.weight"))
    assert torch.equal(encoder["patch_embed.norm.weight"], kept[name])
    assert any(
        "not exported: the head" in line for line in export(run, tmp_path / "timm", "reference")
    )


def test_warnings_of_transformers_stay_out_of_the_output(
    values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging

    logging.warning_once.cache_clear()  # it warns once in a process
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    build(changed(values, "head", kind="mask2former", channels=32))
    logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_images_to_train_on_are_not_those_to_validate_on(values: dict[str, Any]) -> None:
    for change in ({"layout": {"images": "images"}}, {"train": "validation"}):
        with pytest.raises(RecipeError, match="training and validation both use"):
            build(changed(values, "data", **change))
    alone = changed(values, "data", layout={"images": "images/training"}, validation=None)
    assert build(alone).training_shards.samples == 8


def test_two_processes_train_in_shards(
    values: dict[str, Any], tmp_path: Path, train_in_shards: Callable[..., list[dict[str, Any]]]
) -> None:
    """Batch norms of the head keep their own precision, while the rest is gathered in bf16."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert "miou" in train_in_shards(values, run)[-1]
    for step in (2, 4):  # one of them is the best
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        assert (checkpoint / "model-00001-of-00002.safetensors").is_file()
        export(checkpoint, out, "native")
        kept = read_model(checkpoint)
        head = load_dense(out / "segmentation").state_dict()
        for name in ("decode_head.classifier.weight", "auxiliary_head.classifier.weight"):
            (own,) = (one for one in kept if one.endswith(name))
            assert torch.equal(head[name], kept[own])


@pytest.mark.parametrize("split", ["training", "validation"])
def test_labels_that_are_all_ignored_are_refused(values: dict[str, Any], split: str) -> None:
    folder = Path(values["data"]["folder"])
    files = sorted((folder / "annotations" / split).iterdir())
    for file in files[1:]:
        Image.fromarray(np.full(SIZE, 255, dtype=np.uint8)).save(file)
    assert build(values).validates  # one image is enough
    Image.fromarray(np.full(SIZE, 255, dtype=np.uint8)).save(files[0])
    with pytest.raises(ValueError, match=rf"split {split}, has a class.*data\.ignore_label"):
        build(values)


def test_evaluate_takes_another_folder(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["data"]["validation"] = None
    values["training"] |= {"steps": 1, "checkpoint_every": 1}
    run_training(build(values), tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "--data.validation_folder" in capsys.readouterr().err
    write_scenes(tmp_path / "others", "validation", 2)
    options = ["--data.validation", "validation"]
    others = ["--data", str(tmp_path / "others")]
    assert main(["evaluate", str(tmp_path / "run"), *others, *options]) == 0
    assert "miou" in capsys.readouterr().out


def test_exports_know_the_range_of_arrays(values: dict[str, Any], tmp_path: Path) -> None:
    for file in (tmp_path / "scenes" / "images").rglob("*.png"):
        pixels = np.asarray(Image.open(file)).astype(np.uint16) * 257
        np.save(file.with_suffix(".npy"), pixels)
        file.unlink()
    run_training(build(changed(values, "training", steps=2, validate_every=2)), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", "torch-export")
    described = json.loads((tmp_path / "out" / "preprocessing.json").read_text())["preparation"]
    assert described["rescale_factor"] == pytest.approx(1 / 65_535)
