"""Observers: when they look, and what becomes of what they find."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.monitor.observers import Observation, Observer, Watch
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage


class WatchedStage(PretrainStage):
    """A pretraining with one observer more, of a kind that the engine does not know."""

    looked: tuple[tuple[int, bool, bool], ...] = ()

    @property
    def watch(self) -> Watch:
        watch = super().watch
        scales = Observer(
            name="scales",
            activity="measuring the weights",
            every=5,
            observe=self.measure,
            before_first_step=True,
            best_metric="largest_weight",
        )
        return replace(watch, observers=(*watch.observers, scales))

    def measure(self, _accelerator: Accelerator, _run: RunFolder, step: int) -> Observation:
        self.looked += ((step, self.module.training, torch.is_grad_enabled()),)
        largest = max(float(weight.abs().max()) for weight in self.module.parameters())
        return Observation(figures={"largest_weight": largest}, warning=f"measured at step {step}")


def test_a_task_brings_observers_that_the_engine_does_not_know(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    pretrain_values["training"] |= {"steps": 12, "keep_best": True}
    stage, run = (
        WatchedStage(parse(PretrainRecipe, pretrain_values, "test")),
        RunFolder(path=tmp_path),
    )
    result = train(stage, run, build_accelerator("fp32"), None)
    looked = (0, 5, 10, 12)  # at first, every 5 steps, and at last
    assert stage.looked == tuple((step, False, False) for step in looked)
    found = {line["step"]: line for line in run.read_metrics() if "largest_weight" in line}
    assert tuple(found) == looked
    assert "WARNING: measured at step 5" in capsys.readouterr().err
    best = json.loads((run.path / "best.json").read_text())
    assert best["metric"] == "largest_weight"
    assert best["value"] == max(found[step]["largest_weight"] for step in looked[1:])
    assert result.figures.keys() == {"validation_loss", "mean_color_loss"}  # of validation alone
