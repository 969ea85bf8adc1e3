"""Exponential moving average of the weights, in training and in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simmim.engine.checkpoint.directory import complete_checkpoints
from simmim.engine.checkpoint.ema import RunningAverage, read_average
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.engine.settings import OptimizerSettings, TrainingSettings
from simmim.export.load_trained import read_source
from simmim.recipe import parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from swinv2 import load_encoder


def stage_of(values: dict[str, Any], **training: Any) -> ClassificationStage:
    values = values | {"training": values["training"] | training}
    return ClassificationStage(parse(ClassificationRecipe, values, "test"))


def run_training(
    values: dict[str, Any], folder: Path, resume: str | None = None, **training: Any
) -> ClassificationStage:
    stage = stage_of(values, **training)
    train(stage, RunFolder(path=folder), build_accelerator("fp32"), resume)
    return stage


def last(folder: Path) -> Path:
    return complete_checkpoints(folder / "checkpoints")[-1]


def small_optimizer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    named = [{"params": list(model.named_parameters())}]
    return model, torch.optim.AdamW(named, lr=0.1)  # type: ignore[arg-type]


def test_the_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    torch.manual_seed(0)
    model, optimizer = small_optimizer()
    average = RunningAverage(optimizer)
    expected: torch.Tensor | None = None
    for step in range(1, 30):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.7, step)
        decay = min(0.7, (1 + step) / (10 + step))
        weight = model.weight.detach().double()
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    trained = model.weight.detach().clone()
    assert expected is not None
    with average.swapped():
        torch.testing.assert_close(model.weight.detach().double(), expected, rtol=0, atol=1e-6)
        assert not torch.equal(model.weight, trained)
    assert torch.equal(model.weight, trained)


def test_before_the_first_step_there_is_no_average() -> None:
    model, optimizer = small_optimizer()
    average = RunningAverage(optimizer)
    average.update(0.9, 1)
    assert not optimizer.state  # AdamW takes a state that holds anything for its own
    before = model.weight.detach().clone()
    with average.swapped():
        assert torch.equal(model.weight, before)


def test_a_parameter_without_a_gradient_so_far_has_no_average() -> None:
    model, optimizer = small_optimizer()
    average = RunningAverage(optimizer)
    model.weight.requires_grad_(False)
    for step in (1, 2):
        if step == 2:
            model.weight.requires_grad_(True)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.9, step)
        expected = {"ema/bias"} if step == 1 else {"ema/bias", "ema/weight"}
        assert average.shards(0).keys() == expected
        assert average.shards(1) == {}
    assert torch.equal(average.shards(0)["ema/weight"].rows, model.weight)  # it begins with it
    assert all("ema" not in state for state in optimizer.state.values())


def test_weights_come_back_after_an_error() -> None:
    model, optimizer = small_optimizer()
    average = RunningAverage(optimizer)
    for step in (1, 2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        average.update(0.9, step)
    before = model.weight.detach().clone()
    with pytest.raises(OSError, match="full"), average.swapped():
        raise OSError("full")
    assert torch.equal(model.weight, before)


def test_a_resumed_average_equals_the_uninterrupted_one(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    values = classification_values
    run_training(values, tmp_path / "whole", ema_decay=0.9)
    run_training(values, tmp_path / "cut", ema_decay=0.9)
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "complete").unlink()
    run_training(values, tmp_path / "cut", resume="auto", ema_decay=0.9)
    first, second = (read_average(last(tmp_path / name)) for name in ("whole", "cut"))
    weights = read_model(last(tmp_path / "whole"))
    assert first.keys() == second.keys()
    assert first.keys() == {name for name, _ in stage_of(values).module.named_parameters()}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], weights[name]) for name in first)


def test_averaging_changes_no_step(classification_values: dict[str, Any], tmp_path: Path) -> None:
    run_training(classification_values, tmp_path / "without", validate_every=2)
    run_training(classification_values, tmp_path / "with", validate_every=2, ema_decay=0.9)
    without, with_it = (read_model(last(tmp_path / name)) for name in ("without", "with"))
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert read_average(last(tmp_path / "without")) == {}


def test_validation_and_export_use_the_average(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(classification_values, tmp_path / "run", ema_decay=0.9)
    average = read_average(last(tmp_path / "run"))
    below = "model.encoder."
    handed_on = load_encoder(tmp_path / "run" / "encoder")
    exported = read_source(tmp_path / "run")
    (tmp_path / "run" / "encoder").rename(tmp_path / "gone")
    from_checkpoint = read_source(tmp_path / "run").encoder
    for encoder in (handed_on, exported.encoder, from_checkpoint):
        for name, parameter in encoder.named_parameters():
            assert torch.equal(parameter, average[below + name])
    again = stage_of(classification_values)
    again.module.load_state_dict(average, strict=False)
    again.module.eval()
    figures = again.validate(build_accelerator("fp32"))
    lines = RunFolder(path=tmp_path / "run").read_metrics()
    (logged,) = (line for line in lines if "top1" in line)
    assert {name: logged[name] for name in figures} == figures


def test_an_average_without_ema_decay_is_dropped(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(classification_values, tmp_path / "run", steps=4, ema_decay=0.9)
    stage = stage_of(classification_values, steps=8)
    folder = RunFolder(path=tmp_path / "run")
    train(stage, folder, build_accelerator("fp32"), "auto", allow_changes=True)
    assert read_average(last(tmp_path / "run")) == {}


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_impossible_decays_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay is"):
        TrainingSettings(
            batch_size=8, steps=1, ema_decay=decay, optimizer=OptimizerSettings(lr=1e-3)
        )
