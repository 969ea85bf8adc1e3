"""Trackers: selection, logging, and failures that do not end training."""

import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.monitor.tracking import PACKAGES, Tracking, chosen_trackers, flattened
from simmim.engine.run import RunFolder
from simmim.engine.settings import OptimizerSettings, TrackerName, TrainingSettings
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage

RECIPE = TrainingSettings(batch_size=8, steps=4, optimizer=OptimizerSettings(lr=1e-3))


def open_tracking(
    run: RunFolder, *names: TrackerName, step: int = 0, recipe: TrainingSettings = RECIPE
) -> tuple[Tracking, list[str]]:
    Accelerator(cpu=True)  # accelerate's trackers ask which process they are in
    said: list[str] = []
    run.path.mkdir(parents=True, exist_ok=True)
    return Tracking(run, names, recipe=recipe, step=step, warn=said.append), said


@pytest.mark.parametrize("other", ["comet_ml", "aim", "clearml", "swanlab", "trackio"])
def test_other_trackers_are_refused_with_the_three_named(
    pretrain_values: dict[str, Any], other: str
) -> None:
    pretrain_values["training"]["trackers"] = ["wandb", other]
    named = rf"training\.trackers\.1: .*'tensorboard', 'wandb' or 'mlflow', got '{other}'"
    with pytest.raises(ValueError, match=named):
        parse(PretrainRecipe, pretrain_values, "test")
    assert tuple(PACKAGES) == get_args(TrackerName) == ("tensorboard", "wandb", "mlflow")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_pip_command(name: TrackerName) -> None:
    if find_spec(name) is not None:
        assert chosen_trackers((name,)) == (name,)
        return
    with pytest.raises(ValueError, match=f"names {name}.*pip install {re.escape(PACKAGES[name])},"):
        chosen_trackers((name,))


def test_auto_is_tensorboard_alone() -> None:
    assert chosen_trackers(()) == ()
    assert chosen_trackers("auto") == (("tensorboard",) if find_spec("tensorboard") else ())


def test_a_tracker_that_cannot_start_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # importing it fails
    tracking, said = open_tracking(RunFolder(path=tmp_path / "run"), "mlflow")
    for step in range(1, 10):
        tracking.log({"train/loss": 1.0}, step)
    tracking.close()
    assert len(said) == 1
    assert "tracker mlflow failed" in said[0]


@pytest.mark.filterwarnings("default")  # the services' packages have their own
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_receives_figures_and_pictures_of_a_resumed_run(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"pip install {PACKAGES[name]}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    run = RunFolder(path=tmp_path / "run")
    for step in (1, 2):
        recipe = replace(RECIPE, log_every=step)  # a resumed run may change its recipe
        tracking, said = open_tracking(run, name, step=step - 1, recipe=recipe)
        tracking.log({"train/loss": 1.0 / step}, step)
        tracking.log_picture("reconstructions", tmp_path / "picture.png", step)
        tracking.close()
        assert said == []
    ids = json.loads((run.path / "trackers.json").read_text())
    if name == "mlflow":
        (metric,) = (tmp_path / "mlruns").glob(f"*/{ids[name]}/metrics/train/loss")
        assert [line.split()[1] for line in metric.read_text().splitlines()] == ["1.0", "0.5"]
        assert list((tmp_path / "mlruns").glob(f"*/{ids[name]}/artifacts/reconstructions/*.png"))
    else:
        written = list((run.path / "wandb").glob(f"offline-run-*-{ids[name]}"))
        assert written
        assert any(list(one.rglob("reconstructions*.png")) for one in written)


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
