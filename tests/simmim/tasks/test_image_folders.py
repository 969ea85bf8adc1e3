"""Training, probing and the doctor on folders of images, with no shards made."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from simmim.doctor.shards import check_shards
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.input_check import EncoderInput
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.probe.probe import compare
from simmim.tasks.probe.recipe import ProbeRecipe
from simmim.tasks.train import train_recipe


@pytest.fixture
def images(shards: Path, tmp_path: Path) -> Path:
    """The images that the shards were made of, 32 of each of three classes."""
    return Path(shutil.copytree(shards.parent / "images", tmp_path / "images"))


def pretrain(values: dict[str, Any], path: Path, resume: str | None = None) -> RunFolder:
    AcceleratorState._reset_state(reset_partial_state=True)
    run = RunFolder(path=path)
    recipe = parse(PretrainRecipe, values, "test")
    train_recipe(PretrainStage, recipe, run=run, resume=resume, allow_changes=False)
    return run


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


def test_resumed_pretraining_equals_uninterrupted_unless_files_changed(
    pretrain_values: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    pretrain_values["data"]["shards"] = str(images)
    whole = pretrain(pretrain_values, tmp_path / "whole")
    part = pretrain(pretrain_values, tmp_path / "part")
    for step in (8, 12):
        shutil.rmtree(part.checkpoints / f"step-{step:08d}", ignore_errors=True)
    assert losses(pretrain(pretrain_values, tmp_path / "part", resume="auto")) == losses(whole)
    assert not whole.bad_samples.exists()
    next(images.rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="a folder whose files have changed since"):
        pretrain(pretrain_values, tmp_path / "part", resume="auto")


def test_a_folder_is_fine_tuned_on_and_another_validates(
    classification_values: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    validation = Path(shutil.copytree(images, tmp_path / "validation"))
    for file in sorted(validation.rglob("*.png"))[::2]:
        file.unlink()
    data = {"shards": str(images), "validation": str(validation), "fraction": 0.5}
    classification_values["data"] |= data
    recipe = parse(ClassificationRecipe, classification_values, "test")
    run = RunFolder(path=tmp_path / "run")
    result = train_recipe(ClassificationStage, recipe, run=run, resume=None, allow_changes=False)
    assert result.figures["top1"] >= 0
    stage = ClassificationStage(recipe)
    assert stage.classes == ("circle", "square", "stripe")
    assert stage.training_shards.samples == 48
    assert stage.validation_shards is not None
    assert stage.validation_shards.samples == 48
    (validation / "square").rename(validation / "diamond")
    with pytest.raises(
        ValueError, match=r"different classes.*in the first: square; only in the second: diamond"
    ):
        ClassificationStage(recipe)


def test_a_stray_image_has_no_class(classification_values: dict[str, Any], images: Path) -> None:
    classification_values["data"]["shards"] = str(images)
    shutil.copyfile(next(images.rglob("*.png")), images / "stray.png")
    recipe = parse(ClassificationRecipe, classification_values, "test")
    with pytest.raises(ValueError, match=r"1 of .* have no class: put each image in the folder"):
        ClassificationStage(recipe)


def test_frozen_features_are_probed_on_a_folder(encoder_directory: Path, images: Path) -> None:
    data = {"shards": str(images), "validation_shards": 2, "workers": 0}
    values = {"encoder": str(encoder_directory), "init": "pretrained", "data": data}
    found = compare(parse(ProbeRecipe, values, "test"))["pretrained"]
    assert (found.train_samples, found.validation_samples) == (72, 24)


def test_measured_statistics_of_a_folder_are_recorded_as_numbers(
    pretrain_values: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    pretrain_values["data"] |= {"shards": str(images), "mean": "measured"}
    files = images.rglob("*.png")
    pixels = np.concatenate([np.asarray(Image.open(one).convert("RGB")) for one in files])
    pixels = pixels.reshape(-1, 3)
    run = pretrain(pretrain_values, tmp_path / "run")
    recorded = yaml.safe_load((run.path / "recipe.yaml").read_text())["data"]
    assert recorded["mean"] == pytest.approx(pixels.mean(axis=0) / 255, rel=0.01)
    assert recorded["std"] == pytest.approx(pixels.std(axis=0) / 255, rel=0.01)
    pretrain(pretrain_values, tmp_path / "run", resume="auto")  # the recipe is still the same


@pytest.mark.parametrize("mixed", [False, True])
def test_the_doctor_checks_a_folder(
    pretrain_values: dict[str, Any], images: Path, shards: Path, mixed: bool
) -> None:
    folders = [{"shards": str(images)}, {"shards": str(shards)}]
    pretrain_values["data"]["shards"] = folders if mixed else str(images)
    data = parse(PretrainRecipe, pretrain_values, "test").data
    training, validation = data.split_shards()
    faulty = training.name(0, 0)
    (images / faulty).write_bytes(b"")
    wanted = EncoderInput(channels=3, mean=data.mean, std=data.std)
    checks = {check.name: check for check in check_shards(training, validation, data, wanted)}
    assert checks["images"].found == f"84 files in {images}, 3 classes: circle, square, stripe"
    assert checks["images"].verdict == "ok"
    assert ("iB)" in checks["shards"].found) == mixed
    assert ("files" in checks) == mixed
    assert checks["samples"].verdict == ("warning" if mixed else "problem")
    assert f"the first {faulty}: the image is damaged" in checks["samples"].found
