"""Probing in the middle of pretraining."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from simmim.data.loader.batch import Batch
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.probe.online import OnlineProbe, subsample
from simmim.tasks.probe.recipe import OnlineProbeSettings
from tests.simmim.forked import finish


def stage_with(values: dict[str, Any], shards: Path, **probe: Any) -> PretrainStage:
    probe = {"shards": str(shards), "validation_shards": 2, "every": 6, **probe}
    return PretrainStage(parse(PretrainRecipe, values | {"probe": probe}, "test"))


def probed(run: RunFolder) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {key: value for key, value in line.items() if key.startswith("probe_")}
        for line in run.read_metrics()
        if any(key.startswith("probe_") for key in line)
    }


def test_it_runs_before_during_and_after_training(
    pretrain_values: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    run = RunFolder(path=tmp_path / "run")
    train(
        stage_with(pretrain_values, shards, every=5, kind="both"),
        run,
        build_accelerator("fp32"),
        None,
    )
    found = probed(run)
    assert list(found) == [0, 5, 10, 12]
    for figures in found.values():
        assert figures.keys() == {"probe_knn_top1", "probe_linear_top1"}
        assert all(0 <= value <= 100 for value in figures.values())


def test_it_does_not_affect_training(
    pretrain_values: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    with_probe, without = RunFolder(path=tmp_path / "one"), RunFolder(path=tmp_path / "two")
    train(stage_with(pretrain_values, shards), with_probe, build_accelerator("fp32"), None)
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    train(stage, without, build_accelerator("fp32"), None)
    one, two = (
        [line["loss"] for line in run.read_metrics() if "loss" in line]
        for run in (with_probe, without)
    )
    assert one == two


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_features_that_are_the_class_are_always_right(
    pretrain_values: dict[str, Any], shards: Path, kind: str
) -> None:
    stage = stage_with(pretrain_values, shards)
    settings = OnlineProbeSettings(shards=str(shards), validation_shards=2, kind=kind)  # type: ignore[arg-type]
    probe = OnlineProbe(settings, (3, 16, 16), width=3, data=stage.recipe.data)

    def cheat(batch: Batch) -> torch.Tensor:
        assert batch.labels is not None
        return torch.nn.functional.one_hot(batch.labels.clamp(min=0), 3).float()

    assert probe.run(cheat, Accelerator(cpu=True)) == {f"probe_{kind}_top1": 100.0}


def test_it_takes_no_more_images_than_asked_for(
    pretrain_values: dict[str, Any], shards: Path
) -> None:
    stage = stage_with(pretrain_values, shards, samples=12, validation_samples=6)
    assert stage.online_probe is not None
    assert stage.online_probe.known.samples == 12
    assert stage.online_probe.asked.samples == 6
    assert subsample(stage.training_shards, 10**6) is stage.training_shards


def test_mistakes_in_settings_are_named(shards: Path) -> None:
    with pytest.raises(ValueError, match="every is 0"):
        OnlineProbeSettings(shards=str(shards), every=0)
    with pytest.raises(ValueError, match="images to classify"):
        OnlineProbeSettings(shards=str(shards), validation_shards=0)


def pretrain(processes: int, config: Path, run: Path) -> RunFolder:
    arguments = ["-m", "simmim", "pretrain", "--config", str(config), "--folder", str(run)]
    finish(arguments, run.with_suffix(".log"), processes)
    return RunFolder(path=run)


def test_two_processes_find_what_one_finds(
    pretrain_values: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    """Of seven images to classify, and more ranks than images in the last batch."""
    pretrain_values["encoder"]["drop_path"] = 0.0
    pretrain_values["training"] |= {"steps": 2, "checkpoint_every": 2}
    pretrain_values["probe"] = {
        "shards": str(shards),
        "every": 1,
        "validation_samples": 7,
        "samples": 31,
        "batch_size": 5,
        "kind": "both",
    }
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    one = probed(pretrain(1, config, tmp_path / "one"))
    assert probed(pretrain(2, config, tmp_path / "two")) == one
    assert list(one) == [0, 1, 2]
