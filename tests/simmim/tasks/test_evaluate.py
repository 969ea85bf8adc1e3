"""`simmim evaluate` and the tasks that `simmim finetune` knows."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import simmim.cli
from simmim.data.datasets.procedural import draw_images
from simmim.engine.checkpoint.directory import best_checkpoint
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.evaluate import evaluate
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage


@pytest.fixture
def run(classification_values: dict[str, Any], tmp_path: Path) -> Path:
    """A classification that has ended, averages and all."""
    classification_values["training"] |= {"ema_decay": 0.9, "validate_every": 4}
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(classification_values))
    folder = tmp_path / "run"
    assert simmim.cli.main(["finetune", "--config", str(config), "--folder", str(folder)]) == 0
    return folder


def logged(run: Path) -> dict[int, dict[str, Any]]:
    lines = RunFolder(path=run).read_metrics()
    return {line["step"]: line for line in lines if "top1" in line}


def test_it_reproduces_the_validation_of_training(
    run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert simmim.cli.main(["evaluate", str(run), "--last"]) == 0
    text = capsys.readouterr().out
    figures = logged(run)[8]
    assert f"top1 {figures['top1']:.4f}" in text
    assert "averaged weights" in text
    assert re.search(rf"on \d+ images of {re.escape(str(shards))}", text)
    found = evaluate(run / "checkpoints" / "step-00000004")
    assert found.step == 4
    assert found.figures == {name: logged(run)[4][name] for name in found.figures}
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 4]
    (run / "evaluations.jsonl").unlink()
    (run / "evaluations.jsonl").mkdir()  # as in a read-only run, it cannot be written
    best = evaluate(run)
    assert f"was not added to {run / 'evaluations.jsonl'}" in capsys.readouterr().err
    assert best.checkpoint == best_checkpoint(run).resolve()
    assert best.figures["top1"] == max(line["top1"] for line in logged(run).values())


def test_other_data_and_sizes(run: Path, shards: Path) -> None:
    assert simmim.cli.main(["evaluate", str(run), "--data", str(shards)]) == 0
    larger = ["--data.image_size", "32", "--encoder.window_size", "8"]
    assert evaluate(run, larger).figures.keys() == evaluate(run).figures.keys()
    line = json.loads((run / "evaluations.jsonl").read_text().splitlines()[1])
    assert line["changes"] == larger


def test_the_initial_weights_may_be_gone(
    classification_values: dict[str, Any], encoder_directory: Path, tmp_path: Path
) -> None:
    config, folder = tmp_path / "small.yaml", tmp_path / "run"
    classification_values |= {"init": str(encoder_directory)}
    config.write_text(yaml.safe_dump(classification_values))
    assert simmim.cli.main(["finetune", "--config", str(config), "--folder", str(folder)]) == 0
    encoder_directory.rename(tmp_path / "gone")
    found = evaluate(folder, best=False)
    assert found.figures == {name: logged(folder)[8][name] for name in found.figures}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist: give a run folder"),
        (["RUN", "--best", "--data.validation_shards", "0"], "--data.validation"),
        (["RUN", "--data", "nowhere"], "nowhere"),
        (["RUN", "--data.crop_pct", "2"], "crop_pct is 2"),
        (["RUN", "--encoder.embed_dim", "64"], "--encoder.embed_dim"),
        (["RUN", "--encoder.mlp_ratio", "2"], "--encoder.mlp_ratio"),
        (["RUN", "--training.optimizer.lr", "1"], "--training.optimizer.lr"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run) if part == "RUN" else part for part in arguments]
    assert simmim.cli.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_other_sizes_before_the_end_are_refused(run: Path) -> None:
    (run / "encoder").rename(run.parent / "gone")
    assert evaluate(run).figures
    with pytest.raises(ValueError, match=r"--encoder\.window_size changes the encoder"):
        evaluate(run, ["--data.image_size", "32", "--encoder.window_size", "8"])


def test_finetune_names_the_command_of_another_task(
    pretrain_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simmim.cli.main(["finetune", "--config", str(pretrain_config)]) == 2
    told = capsys.readouterr().err
    assert "has task pretrain, which is for another command: simmim pretrain --config" in told


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_pretraining_is_validated_on_other_images(
    as_folder: bool,
    pretrain_values: dict[str, Any],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, run, other = tmp_path / "pretrain.yaml", str(tmp_path / "run"), shards
    pretrain_values["training"] |= {"steps": 2, "validate_every": 2}
    config.write_text(yaml.safe_dump(pretrain_values))
    assert simmim.cli.main(["pretrain", "--config", str(config), "--folder", run]) == 0
    if as_folder:
        other = tmp_path / "others"
        draw_images(other, count=5, size=24, seed=3)
    found = evaluate(Path(run), data=str(other))
    assert found.data == f"{5 if as_folder else 96} images of {other}"
    assert found.figures.keys() == evaluate(Path(run)).figures.keys()
    assert found.figures["validation_loss"] != evaluate(Path(run)).figures["validation_loss"]
    assert found.figures == evaluate(Path(run), ["--data.validation", str(other)]).figures
    capsys.readouterr()
    grey = write_grey_arrays(tmp_path / "grey")
    assert simmim.cli.main(["evaluate", run, "--data", str(grey)]) == 2
    assert "1 channel" in capsys.readouterr().err


def write_grey_arrays(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", np.zeros((24, 24, 1), dtype=np.float32))
    return folder


def test_a_pretraining_validates_on_images_of_their_own(
    pretrain_values: dict[str, Any], shards: Path
) -> None:
    pretrain_values["data"] |= {"validation": str(shards)}
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    assert stage.training_shards.samples == stage.validation_shards.samples == 96
