"""Images that do not fit the encoder's channels or the recipe's scale are refused, or warned of."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import data_prep.cli
import simmim.cli
from simmim.data.datasets.coco import CocoSet
from simmim.data.datasets.opening import open_sets
from simmim.recipe import parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.input_check import (
    EncoderInput,
    check_input,
    check_stage_input,
)
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.probe.probe import compare
from simmim.tasks.probe.recipe import ProbeRecipe
from simmim.tasks.video.recipe import VideoRecipe
from tests.simmim.tasks.example_images import (
    IMAGES,
    LIMIT,
    PHOTOS,
    SIDE,
    findings,
    make_set,
    settings_in,
    truth,
    write_images,
)

MORE = (
    ("uint16x1-4095", True),
    ("uint16x3-10000", True),
    ("uint16x4-3000", True),
    ("uint8x2-255", True),
    ("uint8x6-255", False),
    ("float32x3-300", True),
    ("uint8x3-12", False),
)
"""Further kinds of images, in shards or not."""


@pytest.mark.parametrize(
    ("kind", "as_shards"),
    [
        ("uint16x1-4095", False),
        ("uint16x5-3000", True),
        ("float32x2-1", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
)
def test_other_channels_and_scales_are_refused_with_settings_that_train(
    pretrain_values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    as_shards: bool,
) -> None:
    folder = make_set(tmp_path, kind, as_shards=as_shards)
    pretrain_values["data"] |= {"shards": str(folder), "validation_shards": 0}
    pretrain_values["training"]["steps"] = 2
    config, run = tmp_path / "recipe.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(pretrain_values))
    command = ["pretrain", "--config", str(config), "--folder", str(run)]
    capsys.readouterr()
    assert simmim.cli.main(command) == 2
    message = capsys.readouterr().err
    assert not run.exists()
    assert ("data-prep info --statistics" in message) == as_shards
    channels, mean, std = settings_in(message)
    if channels != 3:
        follow = f"set encoder.in_channels to {channels}, and data.mean and data.std to measured"
        assert follow in " ".join(message.split())
    bits = 8 * np.dtype(kind[: kind.index("x")]).itemsize
    assert re.search(rf"{channels} channels? and {bits} bits", message)
    true_mean, true_std = truth(kind)
    assert channels == len(true_mean)
    assert mean == pytest.approx(true_mean, rel=0.05)
    assert std == pytest.approx(true_std, rel=0.05)
    fitting = ["--encoder.in_channels", str(channels), "--data.mean", str(mean)]
    assert simmim.cli.main([*command, *fitting, "--data.std", str(std)]) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_what_fits_is_ok_and_what_trains_is_a_warning(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", "uint8x3-255")
    grey = write_images(tmp_path / "grey", "uint8x1-255")
    wide = EncoderInput(channels=3, mean=(0.5,) * 3, std=(0.7,) * 3)
    ok = {"channels": "ok", "statistics": "ok"}
    assert findings(photos, PHOTOS) == ok
    assert findings(photos, wide)["statistics"] == "warning"
    assert findings(photos, replace(wide, measured=True)) == ok  # of more images than these
    usual = replace(wide, std=(0.5,) * 3)  # fits less than it could, as many recipes do
    assert findings(photos, usual)["statistics"] == "warning"
    assert check_input(open_sets(str(photos)), usual, LIMIT) == []
    assert check_input(open_sets(str(photos)), wide, LIMIT)
    assert findings(grey, PHOTOS) == {"channels": "warning", "statistics": "ok"}
    assert findings(photos, EncoderInput(channels=1, mean=(0.45,), std=(0.2,))) == ok
    opaque = EncoderInput(channels=4, mean=(0.5,) * 4, std=(0.28,) * 4)
    assert findings(photos, opaque)["channels"] == "warning"
    assert check_input(open_sets(str(photos)), PHOTOS, LIMIT) == []
    (text,) = check_input(open_sets(str(grey)), PHOTOS, LIMIT)
    assert settings_in(text)[0] == 1
    assert "12 images of 1 channel and 8 bits" in text


@pytest.mark.parametrize("values", [[123.7, 116.3, 103.5], [0.5, 0.5, 2.0]])
def test_a_mean_from_0_to_255_is_refused(tmp_path: Path, values: list[float]) -> None:
    photos = write_images(tmp_path / "photos", "uint8x3-255")
    wanted = EncoderInput(channels=3, mean=values, std=[58.4, 57.1, 57.4])
    assert findings(photos, wanted) == {"channels": "ok", "range": "problem"}
    with pytest.raises(ValueError, match="not on the scale of 0 to 1") as caught:
        check_input(open_sets(str(photos)), wanted, LIMIT)
    assert settings_in(str(caught.value))[1] == pytest.approx([0.5, 0.5, 0.5], abs=0.05)
    floats = write_images(tmp_path / "floats", "float32x3-250")
    unscaled = EncoderInput(channels=3, mean=[125.0] * 3, std=[72.0] * 3)
    assert findings(floats, unscaled) == {"channels": "ok", "statistics": "ok"}
    clips = {"clips": "clips", "mean": [123.7, 116.3, 103.5]}
    training = {"batch_size": 8, "steps": 1, "optimizer": {"lr": 1e-3}}
    video = {"task": "video", "encoder": {"window_size": 4}, "data": clips, "training": training}
    with pytest.raises(ValueError, match="scale of 0 to 1"):
        parse(VideoRecipe, video, "test")


@pytest.mark.parametrize("as_shards", [False, True])
def test_measured_alone_asks_for_all_else_at_once(
    pretrain_values: dict[str, Any], tmp_path: Path, as_shards: bool
) -> None:
    folder = make_set(tmp_path, "uint16x5-3000", as_shards=as_shards)
    pretrain_values["data"] |= {"shards": str(folder), "mean": "measured", "validation_shards": 0}
    with pytest.raises(ValueError, match=r"5 channels and 16 bits; .*in_channels is 3") as why:
        PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    if as_shards:
        assert settings_in(str(why.value))[0] == 5
        assert "data-prep info" in str(why.value)
        assert data_prep.cli.main(["info", str(folder), "--statistics"]) == 0
    with pytest.raises(ValueError, match=r"set encoder\.in_channels to 5"):
        PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    pretrain_values["encoder"]["in_channels"] = 5
    if as_shards:
        (folder / "statistics.json").rename(tmp_path / "statistics.json")
        with pytest.raises(ValueError, match=r"Without measuring all, set data\.mean to"):
            PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
        (tmp_path / "statistics.json").rename(folder / "statistics.json")
    recipe = PretrainStage(parse(PretrainRecipe, pretrain_values, "test")).recipe
    mean, std = truth("uint16x5-3000")
    assert recipe.data.mean == pytest.approx(mean, rel=1e-3)
    assert recipe.data.std == pytest.approx(std, rel=1e-3)  # follows, though it was not asked for


def test_a_trained_encoder_is_named_and_its_scale_only_warned_of(tmp_path: Path) -> None:
    bands = write_images(tmp_path / "bands", "uint16x5-3000")
    dark = write_images(tmp_path / "dark", "uint16x1-4095")
    photos = write_images(tmp_path / "photos", "uint8x3-200")
    encoder = EncoderInput(channels=3, mean=PHOTOS.mean, std=PHOTOS.std, trained="runs/base")
    with pytest.raises(ValueError, match=r"runs/base takes 3.*start from an encoder"):
        check_input(open_sets(str(bands)), encoder, LIMIT)
    (text,) = check_input(open_sets(str(dark)), encoder, LIMIT)
    assert "runs/base was trained with [0.485, 0.456, 0.406]" in text
    assert check_input(open_sets(str(photos)), encoder, LIMIT) == []


def test_images_with_boxes_are_compared_too(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", "uint16x1-4095")
    images = [
        {"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE} for n in range(IMAGES)
    ]
    boxes = [
        {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25}
        for n in range(IMAGES)
    ]
    file = tmp_path / "boxes.json"
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 channel and 16 bits") as caught:
        check_input(CocoSet(folder, file, only_with_objects=True), PHOTOS, LIMIT)
    assert settings_in(str(caught.value))[0] == 1


def test_a_resumed_run_is_not_refused(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of before, which nothing refused, go on."""
    folder = write_images(tmp_path / "images", "uint8x3-12")
    own = {"mean": [0.02] * 3, "std": [0.02] * 3}
    pretrain_values["data"] |= {"shards": str(folder), "validation_shards": 0, **own}
    pretrain_values["training"] |= {"steps": 4, "checkpoint_every": 2}
    config, run = tmp_path / "recipe.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(pretrain_values))
    command = ["pretrain", "--config", str(config), "--folder", str(run), "--resume", "auto"]
    assert simmim.cli.main(command) == 0
    other = ["--data.std", "[0.9, 0.9, 0.9]", "--allow-recipe-changes"]
    assert simmim.cli.main([*command, *other]) == 0
    assert "data.std" in capsys.readouterr().err


def test_the_images_of_probes_are_compared(
    pretrain_values: dict[str, Any],
    encoder_directory: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    for label in ("a", "b"):
        write_images(tmp_path / "bands" / label, "uint16x5-3000")
    data = {"shards": str(tmp_path / "bands"), "validation_shards": 1, "workers": 0}
    recipe = {"encoder": str(encoder_directory), "data": data}
    with pytest.raises(ValueError, match=r"takes 3.*start from an encoder"):
        compare(parse(ProbeRecipe, recipe, "test"))
    pretrain_values["probe"] = {"shards": str(tmp_path / "bands"), "every": 1}
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    with pytest.raises(ValueError, match=r"probe\.shards.*5 channels and 16 bits"):
        check_stage_input(stage)


def test_held_out_images_are_compared_too(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    classification_values["encoder"]["in_channels"] = 3
    for name, kind in (("dark", "uint16x1-4095"), ("bands", "uint16x5-3000")):
        for label in ("a", "b"):
            write_images(tmp_path / name / label, kind)
    data = classification_values["data"] | {"validation_shards": 0, "shards": str(tmp_path / "rgb")}
    for label in ("a", "b"):
        write_images(tmp_path / "rgb" / label, "uint8x3-255")

    def stage(validation: str) -> ClassificationStage:
        own = data | {"validation": str(tmp_path / validation)}
        return ClassificationStage(
            parse(ClassificationRecipe, classification_values | {"data": own}, "test")
        )

    assert "held-out" not in " ".join(check_stage_input(stage("rgb")))
    (text,) = [one for one in check_stage_input(stage("dark")) if "held-out" in one]
    assert "16 bits" in text
    assert "images like those of the training" in text
    with pytest.raises(ValueError, match=r"held-out images: .*5 channels and 16 bits"):
        check_stage_input(stage("bands"))


@pytest.mark.parametrize("start", ["init", "like"])
def test_both_starts_of_a_comparison_meet_the_same_check(
    start: str,
    classification_values: dict[str, Any],
    encoder_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Otherwise the pretrained half of a comparison would train and the other be refused."""
    for label in ("a", "b"):
        write_images(tmp_path / "dark" / label, "uint16x1-4095")
    classification_values["data"] |= {"shards": str(tmp_path / "dark")}
    classification_values["training"] |= {"steps": 1}
    values = classification_values | {start: str(encoder_directory)}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(values))
    command = ["finetune", "--config", str(config), "--folder", str(tmp_path / "run")]
    assert simmim.cli.main(command) == 0
    errors = capsys.readouterr().err
    assert f"{encoder_directory} was trained with" in errors
    assert "the recipe has" not in errors


@pytest.mark.parametrize("workers", [10**6, -1])
def test_numbers_of_workers_that_no_machine_has_are_refused(
    pretrain_values: dict[str, Any], workers: int
) -> None:
    pretrain_values["data"]["workers"] = workers
    with pytest.raises(ValueError, match=rf"workers is {workers}; it must be from 0 to 1,000"):
        parse(PretrainRecipe, pretrain_values, "test")
