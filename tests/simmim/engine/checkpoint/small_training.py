"""A small training and its checkpoints."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from simmim.engine.checkpoint.directory import (
    TrainingState,
    discard,
    finish_checkpoint,
    load_state,
)
from simmim.engine.checkpoint.ema import RunningAverage
from simmim.engine.checkpoint.resume import load_model, load_optimizer
from simmim.engine.checkpoint.saver import rank_contents, write_contents
from simmim.engine.optimizer import ParameterGroup, build_optimizer
from simmim.engine.settings import OptimizerSettings

MODEL, OPTIMIZER = "model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"
SETTINGS = OptimizerSettings(lr=0.01)
ONE_GROUP = [
    ParameterGroup(
        names=("0.weight", "0.bias", "1.weight", "1.bias"), weight_decay=0.05, lr_factor=1.0
    )
]


def build(
    groups: list[ParameterGroup] = ONE_GROUP, settings: OptimizerSettings = SETTINGS
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, build_optimizer(model, settings, groups)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    last: int,
    average: RunningAverage | None = None,
) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        if average is not None:
            average.update(0.9, step + 1)


def state_of(step: int) -> TrainingState:
    return TrainingState(
        step=step,
        cursor=8 * step,
        total_steps=100,
        batch_size=8,
        seed=3,
        losses=(0.1 + step, 1 / 3),
        data_digest="d1",
        recipe_hash="0123456789abcdef",
    )


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    average: RunningAverage | None = None,
) -> Path:
    """Write a checkpoint as a single rank does, and remove it if that fails."""
    accelerator = Accelerator(cpu=True)
    contents = rank_contents(model, optimizer, accelerator, state, "", average=average)
    try:
        write_contents(folder, state.step, contents)
    except BaseException:
        discard(folder, state.step)
        raise
    return finish_checkpoint(folder, state.step, 1)


def save(folder: Path, step: int) -> Path:
    model, optimizer = build()
    train(model, optimizer, 0, step)
    return save_checkpoint(folder, model, optimizer, state_of(step))


def assert_whole(path: Path) -> None:
    """What a checkpoint holds is what training had at its step, bit for bit."""
    step = int(path.name.removeprefix("step-"))
    expected, expected_optimizer = build()
    train(expected, expected_optimizer, 0, step)
    model, optimizer = build()
    load_model(path, model)
    load_optimizer(path, optimizer)
    assert load_state(path) == state_of(step)
    assert_same((model, optimizer), (expected, expected_optimizer))


def assert_same(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    for left, right in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(left, right)
        first, second = one[1].state[left], other[1].state[right]
        assert first.keys() == second.keys()
        assert all(
            torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first
        )
