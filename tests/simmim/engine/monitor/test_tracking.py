"""Trackers: selection, logging, and failures that do not end training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.monitor.tracking import Tracking, chosen_trackers, flattened
from simmim.engine.run import RunFolder
from simmim.engine.settings import OptimizerSettings, TrainingSettings
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage

RECIPE = TrainingSettings(batch_size=8, steps=4, optimizer=OptimizerSettings(lr=1e-3))


def open_tracking(run: RunFolder, *names: str, step: int = 0) -> tuple[Tracking, list[str]]:
    Accelerator(cpu=True)  # accelerate's trackers ask which process they are in
    said: list[str] = []
    run.path.mkdir(parents=True, exist_ok=True)
    return Tracking(run, names, recipe=RECIPE, step=step, warn=said.append), said


def test_a_missing_package_is_named_with_its_pip_command() -> None:
    missing = "aim"  # wants an old Python, and is on no machine of ours
    with pytest.raises(ValueError, match="pip install aim"):
        chosen_trackers((missing,))
    assert chosen_trackers(()) == ()
    assert set(chosen_trackers("auto")) <= {"tensorboard"}


def test_a_tracker_that_cannot_start_is_reported_once(tmp_path: Path) -> None:
    tracking, said = open_tracking(RunFolder(path=tmp_path / "run"), "aim")
    for step in range(1, 10):
        tracking.log({"train/loss": 1.0}, step)
    tracking.close()
    assert len(said) == 1
    assert "aim" in said[0]


def test_a_recipe_becomes_numbers_and_text_under_dotted_keys() -> None:
    values = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "text"}
    assert dict(flattened(values)) == {"a.b": 1, "a.c": "[1, 2]", "d": "null", "e": "text"}


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(tag)}


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="pip install 'simmim[track]'")


@pytest.mark.usefixtures("tensorboard")
def test_a_resumed_series_has_no_duplicate_steps(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    first, _ = open_tracking(run, "tensorboard")
    for step in range(1, 9):
        first.log({"train/loss": float(step), "train/mfu_peak": "matmul"}, step)
    first.close()
    again, said = open_tracking(run, "tensorboard", step=5)
    for step in range(6, 8):
        again.log({"train/loss": 10.0 * step}, step)
    again.close()
    assert said == []
    logged = scalars(run.path / "tensorboard", "train/loss")
    assert logged == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 60, 7: 70}


@pytest.mark.usefixtures("tensorboard")
def test_a_tracker_that_keeps_failing_is_dropped(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    tracking, said = open_tracking(run, "tensorboard")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"no picture")
    for step in range(1, 10):
        tracking.log_picture("reconstructions", picture, step)
    tracking.log({"train/loss": 1.0}, 10)
    tracking.close()
    assert len(said) == 2
    assert "no longer used" in said[1]


@pytest.mark.usefixtures("tensorboard")
def test_training_writes_figures_recipe_and_pictures(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain_values["training"]["trackers"] = ["tensorboard"]
    run = RunFolder(path=tmp_path / "run")
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    train(stage, run, build_accelerator("fp32"), None)
    written = EventAccumulator(str(run.path / "tensorboard"))
    written.Reload()
    tags = written.Tags()
    assert {"train/loss", "train/mean_color_loss", "validation/validation_loss"} <= set(
        tags["scalars"]
    )
    assert tags["images"] == ["reconstructions"]
    assert tags["tensors"] == ["recipe/text_summary"]
    picture = next(run.reconstructions.iterdir())
    (shown_picture,) = written.Images("reconstructions")
    with Image.open(picture) as image:
        assert image.size == (shown_picture.width, shown_picture.height)
    logged = {line["step"]: line["loss"] for line in run.read_metrics() if "lr" in line}
    shown = scalars(run.path / "tensorboard", "train/loss")
    assert shown.keys() == logged.keys()
    assert np.allclose([shown[step] for step in shown], [logged[step] for step in shown])
