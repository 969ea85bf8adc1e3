"""The number of slots follows from the data, is recorded, and is kept when a run is resumed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import simmim.cli
from simmim.data.order import order as order_module
from simmim.doctor.shards import check_order
from simmim.recipe import parse, read_values
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage

IMAGES = 23
"""Prime: no number of slots but one and itself divides it."""


@pytest.fixture
def images(shards: Path, tmp_path: Path) -> Path:
    """A flat folder of a few images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted((shards.parent / "images").rglob("*.png"))[:IMAGES]:
        shutil.copyfile(file, folder / f"{file.parent.name}-{file.name}")
    return folder


def of_folder(values: dict[str, Any], images: Path, batch_size: int) -> dict[str, Any]:
    values["data"] |= {"shards": str(images), "validation_shards": 0}
    values["training"] |= {"batch_size": batch_size, "steps": None, "epochs": 4, "log_every": 1}
    return values


@pytest.mark.parametrize("batch_size", [6, 32])
def test_all_images_of_a_small_set_are_in_every_epoch(
    pretrain_values: dict[str, Any], images: Path, batch_size: int
) -> None:
    values = of_folder(pretrain_values, images, batch_size)
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    assert stage.order.samples_per_epoch == IMAGES
    steps = stage.recipe.training.total_steps(stage.order.samples_per_epoch)
    assert steps == round(4 * IMAGES / batch_size)
    end = steps * batch_size
    whole = [batch.addresses.tolist() for batch in stage.batches(rank=0, world=1, start=0, end=end)]
    seen = [tuple(address) for batch in whole for address in batch]
    assert len(set(seen)) == len(seen)
    assert all(sum(epoch == number for epoch, *_ in seen) == IMAGES for number in range(3))
    for world in (2,) if batch_size % 4 else (2, 4):
        ranks = [stage.batches(rank=rank, world=world, start=0, end=end) for rank in range(world)]
        for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
            assert [address for part in parts for address in part.addresses.tolist()] == batch


def test_the_run_records_its_slots_and_resumes_with_a_recipe_without_them(
    pretrain_values: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    config, run = tmp_path / "recipe.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(of_folder(pretrain_values, images, 10)))
    command = ["pretrain", "--config", str(config), "--folder", str(run)]
    assert simmim.cli.main(command) == 0
    assert read_values(run / "recipe.yaml")["data"]["slots"] == 1
    before = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    assert simmim.cli.main([*command, "--resume", "auto"]) == 0
    losses = [
        [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
        for text in (before, (run / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9


def test_fixed_slots_that_leave_images_out_are_told(
    pretrain_values: dict[str, Any],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(of_folder(pretrain_values, images, 8)))
    command = ["pretrain", "--config", str(config), "--folder", str(tmp_path / "run")]
    assert simmim.cli.main([*command, "--data.slots", "8"]) == 0
    assert "leave 7 samples out of each epoch: remove data.slots" in capsys.readouterr().err
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    assert check_order(stage.order, 8).verdict == "ok"
    pretrain_values["data"]["slots"] = 8
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    check = check_order(stage.order, 8)
    assert (check.verdict, "remove data.slots" in check.change) == ("warning", True)


def test_large_sets_take_slots_from_the_batch(
    classification_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "WHOLE_SHUFFLE_LIMIT", 50)
    classification_values["data"] |= {"slots": None}
    classification_values["training"]["batch_size"] = 12
    recipe = parse(ClassificationRecipe, classification_values, "test")
    assert ClassificationStage(recipe).recipe.data.slots == 12
    sets = [{"shards": classification_values["data"]["shards"]}] * 2
    classification_values["data"] |= {"shards": sets, "fraction": 0.5}
    recipe = parse(ClassificationRecipe, classification_values, "test")
    assert ClassificationStage(recipe).recipe.data.slots == 1


def test_a_list_of_slots_is_for_mixtures(pretrain_values: dict[str, Any]) -> None:
    pretrain_values["data"]["slots"] = [1, 4]
    with pytest.raises(ValueError, match="a list is for mixtures"):
        PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    pretrain_values["data"] |= {"shards": [{"shards": pretrain_values["data"]["shards"]}] * 2}
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    assert (stage.order.slots, stage.recipe.data.slots) == (4, (1, 4))
    for slots, message in (
        (0, "1 mistake:\n  data.slots is 0; it must be 1 or more."),
        ([4, 0], "1 mistake:\n  data.slots.1 is 0; it must be 1 or more."),
        ("x", "data.slots: Input should be a valid integer, or a list, got 'x'"),
    ):
        pretrain_values["data"]["slots"] = slots
        with pytest.raises(ValueError, match=re.escape(message)):
            parse(PretrainRecipe, pretrain_values, "test")
