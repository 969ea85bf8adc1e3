"""Images of several classes: loss and figures by their definitions, and a training."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, parse
from simmim.tasks.classification.multi_label import average_precisions, multi_label_losses
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.evaluate import evaluate
from simmim.tasks.train import train_recipe


def average_precision(scores: list[float], labels: list[bool]) -> float:
    """By its definition, threshold by threshold."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        reached = sum(chosen) / sum(labels)
        total += (reached - recall) * sum(chosen) / len(chosen)
        recall = reached
    return total


def test_average_precision_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 8, (30, 4), generator=generator).float()  # many are equal
        labels = torch.rand(30, 4, generator=generator) < 0.3
        labels[:, 2] = False
        found = average_precisions(scores, labels)
        expected = [
            average_precision(scores[:, place].tolist(), labels[:, place].tolist())
            for place in (0, 1, 3)
            if labels[:, place].any()
        ]
        assert found.tolist() == pytest.approx(expected)
    perfect = torch.tensor([[0.9], [0.8], [0.1]])
    assert average_precisions(perfect, torch.tensor([[True], [True], [False]])).tolist() == [1.0]
    assert average_precisions(perfect, torch.zeros(3, 1, dtype=torch.bool)).tolist() == []


def test_smoothing_spreads_a_share_of_each_target() -> None:
    logits, labels = torch.randn(5, 4), torch.rand(5, 4) < 0.5
    plain = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    torch.testing.assert_close(multi_label_losses(logits, labels, smoothing=0.0), plain.mean(1))
    targets = torch.where(labels, 0.9 + 0.1 / 4, 0.1 / 4)
    smooth = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(multi_label_losses(logits, labels, smoothing=0.1), smooth.mean(1))


@pytest.mark.peer
def test_one_class_each_has_the_loss_of_timm() -> None:
    timm_loss = pytest.importorskip("timm.loss", exc_type=ImportError)
    logits, classes = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    theirs = timm_loss.BinaryCrossEntropy(smoothing=0.1)(logits, classes)
    ours = multi_label_losses(logits, functional.one_hot(classes, 4).bool(), smoothing=0.1)
    torch.testing.assert_close(ours.mean(), theirs)


@pytest.fixture
def attributes(tmp_path: Path) -> Path:
    """Images that are red, or bright below, or both, or neither."""
    folder = tmp_path / "attributes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(96):
        pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        labels = [place for place in range(2) if rng.random() < 0.5]
        if 0 in labels:
            pixels[:8, :, 0] += 150
        if 1 in labels:
            pixels[8:] += 150
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_two_attributes_are_learnt(
    classification_values: dict[str, Any], attributes: Path, tmp_path: Path
) -> None:
    classification_values["data"] |= {
        "shards": str(attributes),
        "flip": 0.0,
        "multi_label": {"classes": ["red", "bright"]},
        "scale": [0.9, 1.0],
    }
    classification_values["augmentation"] = {"mixup": 0.2}
    classification_values["training"] |= {"steps": 40, "validate_every": 20, "keep_best": True}
    classification_values["encoder"]["drop_path"] = 0.0
    recipe = parse(ClassificationRecipe, classification_values, "test")
    run = RunFolder(path=tmp_path / "run")
    result = train_recipe(ClassificationStage, recipe, run=run, resume=None, allow_changes=False)
    assert set(result.figures) == {"validation_loss", "mean_average_precision"}
    assert result.figures["mean_average_precision"] > 90
    names = json.loads((run.path / "classifier" / "classes.json").read_text())["classes"]
    assert names == ["red", "bright"]
    assert json.loads((run.path / "best.json").read_text())["metric"] == "mean_average_precision"
    stage = ClassificationStage(recipe)
    assert stage.training_shards.samples == 72
    assert stage.validation_shards is not None
    assert stage.validation_shards.samples == 24


def test_no_class_anywhere_is_refused_and_none_held_out_is_said(
    classification_values: dict[str, Any],
    attributes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = Path(shutil.copytree(attributes, tmp_path / "held out"))
    for file in held_out.glob("*.json"):
        file.write_text('{"labels": []}')
    data = {"shards": str(attributes), "multi_label": {"classes": ["red", "bright"]}}
    classification_values["data"] |= data | {"validation": str(held_out)}
    classification_values["training"] |= {"steps": 1}
    recipe = parse(ClassificationRecipe, classification_values, "test")
    run = RunFolder(path=tmp_path / "run")
    result = train_recipe(ClassificationStage, recipe, run=run, resume=None, allow_changes=False)
    assert set(result.figures) == {"validation_loss"}
    assert "nothing to measure mean_average_precision by" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has nothing to measure mean_average_precision by"):
        evaluate(run.path)
    for file in attributes.glob("*.json"):
        file.write_text('{"labels": []}')
    with pytest.raises(ValueError, match="lists a class in its field 'labels'"):
        ClassificationStage(recipe)


def test_two_images_never_share_their_classes(
    classification_values: dict[str, Any], attributes: Path
) -> None:
    data = {"shards": str(attributes), "multi_label": {"classes": ["red", "bright"]}}
    classification_values["data"] |= data
    Image.open(attributes / "007.png").save(attributes / "007.jpg")
    recipe = parse(ClassificationRecipe, classification_values, "test")
    with pytest.raises(ValueError, match="share one JSON") as refused:
        ClassificationStage(recipe)
    assert "007.jpg" in str(refused.value)
    assert "007.png" in str(refused.value)


def test_classes_are_given_in_one_place(classification_values: dict[str, Any]) -> None:
    classification_values["data"] |= {"multi_label": {"classes": ["a"]}, "classes": ["circle"]}
    with pytest.raises(RecipeError, match="leave out classes"):
        parse(ClassificationRecipe, classification_values, "test")
    del classification_values["data"]["classes"]
    for names in ([], ["a", "a"]):
        classification_values["data"]["multi_label"]["classes"] = names
        with pytest.raises(RecipeError, match="classes must be"):
            parse(ClassificationRecipe, classification_values, "test")
