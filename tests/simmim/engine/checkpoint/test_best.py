"""The best checkpoint: written, kept, and named in the run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from simmim.engine.checkpoint.choosing import chosen_checkpoint
from simmim.engine.checkpoint.directory import (
    Best,
    best_checkpoint,
    complete_checkpoints,
    is_better,
    kept_best,
    load_state,
    write_best,
)
from simmim.engine.checkpoint.ema import read_average
from simmim.engine.checkpoint.resume import load_initial, read_model
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import TrainingResult, train
from simmim.engine.run import RunFolder
from simmim.export.load_trained import read_source
from simmim.recipe import parse
from simmim.tasks.architecture import describe_start
from simmim.tasks.classification.classifier import load_classifier
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.train import print_result
from swinv2 import read_encoder_config


class GradedStage(ClassificationStage):
    """A classification stage with prescribed validation results."""

    grades: Iterator[float]

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        return super().validate(accelerator) | {"top1": next(self.grades)}


def run_training(
    values: dict[str, Any], folder: Path, grades: list[float], resume: str | None = None, **own: Any
) -> None:
    training = values["training"] | {"validate_every": 2, "checkpoint_every": 100, "keep_last": 1}
    values = values | {"training": training | own}
    stage = GradedStage(parse(ClassificationRecipe, values, "test"))
    stage.grades = iter(grades)
    train(stage, RunFolder(path=folder), build_accelerator("fp32"), resume)


def steps(folder: Path) -> list[int]:
    return [load_state(path).step for path in complete_checkpoints(folder / "checkpoints")]


def test_the_best_checkpoint_is_kept_and_named(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(classification_values, tmp_path, [10, 30, 20, 30])
    assert steps(tmp_path) == [4, 8]  # the first of equals, and the last
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000004"
    named = json.loads((tmp_path / "best.json").read_text())
    assert named == {
        "checkpoint": "checkpoints/step-00000004",
        "step": 4,
        "metric": "top1",
        "value": 30,
    }


@pytest.mark.parametrize("ema", [None, 0.5])
def test_encoder_and_head_of_the_best_are_exported(
    classification_values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ema: float | None,
) -> None:
    run_training(classification_values, tmp_path, [10, 30, 20, 25], ema_decay=ema)
    best = tmp_path / "checkpoints" / "step-00000004"
    kept = read_model(best) | read_average(best)
    found = load_classifier(tmp_path / "encoder", tmp_path / "classifier").model.state_dict()
    assert all(torch.equal(part, kept[f"model.{name}"]) for name, part in found.items())
    provenance = read_encoder_config(tmp_path / "encoder").provenance
    assert (provenance.step, provenance.samples_seen) == (4, 32)
    capsys.readouterr()
    result = TrainingResult(step=8, stopped=False, figures={"top1": 25.0})
    print_result(result, RunFolder(path=tmp_path), None)
    said = capsys.readouterr().out
    for line in (
        "Done: 8 steps; top1 25.0000.",
        f"Encoder  {tmp_path}/encoder (of the best checkpoint)",
        f"Head     {tmp_path}/classifier (of the best checkpoint)",
        f"Best     {best}: top1 30.0000 at step 4",
        f"Last     simmim export {tmp_path} FOLDER --last exports step 8",
    ):
        assert line in said.splitlines()
    # What starts from the run starts from its best, too.
    stage = ClassificationStage(parse(ClassificationRecipe, classification_values, "test"))
    assert str(best) in load_initial(tmp_path, stage.module)
    assert torch.equal(stage.model.head.weight, kept["model.head.weight"])


def test_the_last_is_exported_where_the_best_is_damaged(
    classification_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class DamagingStage(GradedStage):
        def validate(self, accelerator: Accelerator) -> dict[str, float]:
            figures = super().validate(accelerator)
            if figures["top1"] == 25:
                best = tmp_path / "checkpoints" / "step-00000004"
                file = next(best.glob("model-*.safetensors"))
                file.write_bytes(file.read_bytes()[:-100])
            return figures

    training = classification_values["training"] | {"validate_every": 2, "keep_last": 2}
    values = classification_values | {"training": training}
    stage = DamagingStage(parse(ClassificationRecipe, values, "test"))
    stage.grades = iter([10, 30, 20, 25])
    train(stage, RunFolder(path=tmp_path), build_accelerator("fp32"), None)
    assert "the last step is exported, not the best" in capsys.readouterr().err
    kept = read_model(tmp_path / "checkpoints" / "step-00000008")
    found = load_classifier(tmp_path / "encoder", tmp_path / "classifier").model.state_dict()
    assert all(torch.equal(part, kept[f"model.{name}"]) for name, part in found.items())
    assert read_encoder_config(tmp_path / "encoder").provenance.step == 8
    print_result(TrainingResult(step=8, stopped=False, figures={}), RunFolder(path=tmp_path), None)
    said = capsys.readouterr().out.splitlines()
    assert f"Encoder  {tmp_path}/encoder" in said
    assert f"Head     {tmp_path}/classifier" in said
    assert not any("--last" in line for line in said)


def test_a_best_checkpoint_that_is_gone_is_said(
    classification_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(classification_values, tmp_path, [10, 30, 20, 25])
    best, last = complete_checkpoints(tmp_path / "checkpoints")
    exported = load_classifier(tmp_path / "encoder", tmp_path / "classifier").model.head.weight
    shutil.rmtree(best)
    for choice in (None, True):  # the run's own export still has it
        found = read_source(tmp_path, best=choice)
        assert found.provenance.step == 4
        assert found.classifier is not None
        assert torch.equal(found.classifier.weight, exported)
    assert read_source(tmp_path, best=False).provenance.step == 8
    capsys.readouterr()
    assert chosen_checkpoint(tmp_path) == last
    said = capsys.readouterr().err
    assert f"WARNING: {best}, the best checkpoint (top1 30.0000), is gone" in said
    assert f"{last.name}, the last, is taken" in said
    assert chosen_checkpoint(tmp_path, best=False) == last
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step-00000004, the best .* leave out --best"):
        chosen_checkpoint(tmp_path, best=True)


def test_starting_from_an_encoder_that_is_not_the_best_is_said(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(classification_values, tmp_path, [10, 30, 20, 25])
    starts = [
        parse(ClassificationRecipe, classification_values | {"init": init}, "test")
        for init in (str(tmp_path), str(tmp_path / "encoder"))
    ]
    assert [describe_start(one) for one in starts] == [None, None]
    write_best(tmp_path, Best(step=6, metric="top1", value=50.0))
    for one in starts:
        said = describe_start(one)
        assert said is not None
        assert "is of step 4" in said
        assert f"simmim export {tmp_path} FOLDER" in said


def test_a_resumed_run_remembers_the_best_so_far(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(classification_values, tmp_path, [10, 30, 20, 25])
    longer = classification_values
    longer["training"] |= {"steps": 12}
    stage = GradedStage(
        parse(
            ClassificationRecipe,
            longer | {"training": longer["training"] | {"validate_every": 2, "keep_last": 1}},
            "test",
        )
    )
    stage.grades = iter([29, 28])
    folder = RunFolder(path=tmp_path)
    train(stage, folder, build_accelerator("fp32"), "auto", allow_changes=True)
    assert steps(tmp_path) == [4, 12]
    assert best_checkpoint(tmp_path).name == "step-00000004"


def test_the_best_of_another_folder_stays_there(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(classification_values, tmp_path / "one", [10, 30, 20, 25])
    last = str(tmp_path / "one" / "checkpoints" / "step-00000008")
    longer = {"steps": 12, "schedule": {"warmup_steps": 0}}
    run_training(classification_values, tmp_path / "two", [29, 28], resume=last, **longer)
    assert steps(tmp_path / "two") == [10, 12]
    assert kept_best(tmp_path / "two") == tmp_path / "two" / "checkpoints" / "step-00000010"


def test_repeated_steps_are_compared_again(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(
        classification_values, tmp_path, [10, 30, 20, 40], keep_every=2, checkpoint_every=2
    )
    again = str(tmp_path / "checkpoints" / "step-00000004")
    run_training(classification_values, tmp_path, [20, 25], resume=again, checkpoint_every=2)
    assert best_checkpoint(tmp_path).name == "step-00000004"
    assert steps(tmp_path) == [4, 8]


def test_keep_best_can_be_disabled(classification_values: dict[str, Any], tmp_path: Path) -> None:
    run_training(classification_values, tmp_path, [10, 30, 20, 25], keep_best=False)
    assert steps(tmp_path) == [8]
    assert read_encoder_config(tmp_path / "encoder").provenance.step == 8
    with pytest.raises(ValueError, match="names no best checkpoint"):
        best_checkpoint(tmp_path)


def test_is_better_compares_values_of_the_same_metric() -> None:
    best = Best(step=3, metric="top1", value=50.0)
    assert is_better(None, {"top1": 0.0}, "top1")
    assert is_better(best, {"top1": 50.1}, "top1")
    assert not is_better(best, {"top1": 50.0}, "top1")
    assert not is_better(best, {}, "top1")
    assert is_better(best, {"miou": 1.0}, "miou")  # another recipe's figure cannot be compared


def test_write_best_removes_the_file(tmp_path: Path) -> None:
    write_best(tmp_path, Best(step=3, metric="top1", value=50.0))
    write_best(tmp_path, None)
    write_best(tmp_path, None)
    assert not list(tmp_path.iterdir())
