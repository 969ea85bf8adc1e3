"""Checkpoint directories. Run as a script, this file writes checkpoints until it is killed."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simmim.engine.checkpoint.directory import (
    COMPLETE,
    checkpoint_path,
    complete_checkpoints,
    discard_all,
    find_checkpoint,
    load_state,
    remove_later_checkpoints,
    remove_old_checkpoints,
)
from simmim.engine.checkpoint.ema import RunningAverage, read_average
from simmim.engine.checkpoint.resume import load_model, load_optimizer
from simmim.engine.optimizer import ParameterGroup, build_optimizer
from simmim.engine.settings import OptimizerSettings
from tests.simmim.engine.checkpoint.small_training import (
    MODEL,
    ONE_GROUP,
    SETTINGS,
    assert_same,
    assert_whole,
    build,
    save,
    save_checkpoint,
    state_of,
    train,
)
from tests.simmim.forked import finish


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)]


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    whole, whole_optimizer = build()
    train(whole, whole_optimizer, 0, 7)
    path = save(tmp_path, 4)
    model, optimizer = build()
    train(model, optimizer, 50, 52)  # forgotten by loading
    load_model(path, model)
    load_optimizer(path, optimizer)
    train(model, optimizer, load_state(path).step, 7)
    assert_same((model, optimizer), (whole, whole_optimizer))


def test_step_0_has_a_checkpoint_too(tmp_path: Path) -> None:
    assert_whole(save(tmp_path, 0))


def test_checkpoints_are_found_by_rising_step(tmp_path: Path) -> None:
    assert steps(tmp_path / "absent") == []
    for step in (12, 3, 100_000_000, 7):
        save(tmp_path, 0).rename(checkpoint_path(tmp_path, step))
    assert steps(tmp_path) == [3, 7, 12, 100_000_000]
    found = find_checkpoint(tmp_path, "auto")
    assert found == checkpoint_path(tmp_path, 100_000_000)


def test_incomplete_checkpoints_are_never_found(tmp_path: Path) -> None:
    save(tmp_path, 2)
    later = save(tmp_path, 5)
    (later / COMPLETE).unlink()
    (tmp_path / ".step-00000009.partial-1").mkdir()
    (tmp_path / ".step-00000009.partial-1" / COMPLETE).touch()
    assert find_checkpoint(tmp_path, "auto") == checkpoint_path(tmp_path, 2)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        find_checkpoint(tmp_path, str(later))
    (checkpoint_path(tmp_path, 2) / COMPLETE).unlink()
    assert find_checkpoint(tmp_path, "auto") is None


def test_a_path_names_its_checkpoint(tmp_path: Path) -> None:
    earlier = save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path, str(earlier)) == earlier
    for other in (tmp_path, tmp_path / "absent", earlier / "state.json"):
        with pytest.raises(ValueError, match="--resume auto for the last complete one"):
            find_checkpoint(tmp_path, str(other))


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    shutil.copytree(checkpoint_path(tmp_path, 1), tmp_path / "step-00000001-best")
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    (tmp_path / ".step-file").write_text("a file")
    remove_old_checkpoints(tmp_path, keep_last=1)
    discard_all(tmp_path)
    assert steps(tmp_path) == [3]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "step-00000001-best",
        "step-notes",
        "step-00000003",
        "step-00000004",
        ".step-file",
    }


@pytest.mark.parametrize("keep_last", [1, 2, 3, 9])
def test_the_last_ones_are_kept(tmp_path: Path, keep_last: int) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (checkpoint_path(tmp_path, 3) / COMPLETE).unlink()
    (tmp_path / ".step-00000005.writing").mkdir()
    remove_old_checkpoints(tmp_path, keep_last)
    discard_all(tmp_path)
    assert steps(tmp_path) == [1, 2, 4][-keep_last:]
    assert len(list(tmp_path.iterdir())) == len(steps(tmp_path))


def test_resuming_from_an_earlier_step_removes_later_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (checkpoint_path(tmp_path, 4) / COMPLETE).unlink()
    remove_later_checkpoints(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}
    remove_later_checkpoints(tmp_path / "absent", 2)


def test_a_repeated_step_replaces_its_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (path / MODEL).write_bytes(b"old")
    save(tmp_path, 2)
    assert_whole(path)


def test_optimizer_state_is_restored_by_name_and_hyperparameters_stay(
    tmp_path: Path,
) -> None:
    model, optimizer = build()
    train(model, optimizer, 0, 3)
    path = save_checkpoint(tmp_path, model, optimizer, state_of(3))
    regrouped = [
        ParameterGroup(names=("1.weight", "0.bias"), weight_decay=0.3, lr_factor=0.5),
        ParameterGroup(names=("1.bias", "0.weight"), weight_decay=0.0, lr_factor=1.0),
    ]
    settings = OptimizerSettings(lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    again, other = build(regrouped, settings)
    load_model(path, again)
    load_optimizer(path, other)
    assert_same((again, other), (model, optimizer))
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.0]
    assert [group["lr_factor"] for group in other.param_groups] == [0.5, 1.0]
    assert {group["betas"] for group in other.param_groups} == {(0.8, 0.9)}
    assert {group["eps"] for group in other.param_groups} == {1e-6}


class CoarseMomentum(torch.optim.Optimizer):
    """SGD with momentum in 8 bits: states of other dtypes and shapes than the parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                gradient = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad
                momentum = gradient
                if state:
                    sign = 2.0 * state["positive"] - 1
                    momentum = gradient + sign * state["momentum"].float() * state["scale"]
                scale = momentum.abs().amax(dim=-1, keepdim=True) / 255
                parameter.sub_(group["lr"] * momentum.view(parameter.shape))
                state["momentum"] = (momentum.abs() / scale).round().to(torch.uint8)
                state["positive"] = momentum > 0
                state["scale"] = scale
                state["steps"] = state.get("steps", 0) + 1


def coarse(model: nn.Module) -> torch.optim.Optimizer:
    named = [{"params": list(model.named_parameters())}]
    return CoarseMomentum(named, {"lr": 0.01})  # type: ignore[arg-type]


def adamw_8bit(model: nn.Module) -> torch.optim.Optimizer:
    pytest.importorskip("bitsandbytes", reason="pip install 'simmim[8bit]'")
    return build_optimizer(model, replace(SETTINGS, name="adamw_8bit"), ONE_GROUP)


@pytest.mark.parametrize("make", [coarse, adamw_8bit])
def test_8_bit_states_and_averages_resume_as_if_uninterrupted(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    def build_large() -> tuple[nn.Module, torch.optim.Optimizer, RunningAverage]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2048), nn.Linear(2048, 4))  # above 4096 numbers
        optimizer = make(model)
        return model, optimizer, RunningAverage(optimizer)

    whole, whole_optimizer, whole_average = build_large()
    train(whole, whole_optimizer, 0, 5, whole_average)
    model, optimizer, average = build_large()
    train(model, optimizer, 0, 3, average)
    path = save_checkpoint(tmp_path, model, optimizer, state_of(3), average)
    again, other, other_average = build_large()
    load_model(path, again)
    load_optimizer(path, other)
    other_average.load(path)
    assert_same((again, other), (model, optimizer))
    train(again, other, 3, 5, other_average)
    assert_same((again, other), (whole, whole_optimizer))
    kinds = {
        value.dtype
        for state in other.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert torch.uint8 in kinds
    first = save_checkpoint(tmp_path / "first", whole, whole_optimizer, state_of(5), whole_average)
    second = save_checkpoint(tmp_path / "second", again, other, state_of(5), other_average)
    expected, found = read_average(first), read_average(second)
    assert expected.keys() == found.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def write_next(folder: Path) -> None:
    """What training does when a checkpoint is due, in a folder that holds steps 1 and 2."""
    save(folder, 3)
    remove_old_checkpoints(folder, keep_last=2)


def write_again(folder: Path) -> None:
    """Take step 2 again, in a folder that holds it."""
    save(folder, 2)


WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def killed_at(number: int, writer: Callable[[Path], None], folder: Path) -> bool:
    """Run `writer` in a process that is killed before its `number`th change of a file.

    Returns:
        Whether it came to that; else it ended.
    """
    process = os.fork()
    if process == 0:
        changes = 0

        def kill(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes
            # Folders are emptied by bare names.
            if event in WRITES and (event != "open" or str(folder) in str(arguments[0])):
                changes += 1
                if changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        writer(folder)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def kill_everywhere(
    writer: Callable[[Path], None], folder: Path, lasts: set[int], at_last: list[int]
) -> int:
    """Kill a writer at its first change, at its second, … and look at what it leaves.

    Returns:
        How many changes it makes.
    """
    for step in (1, 2):
        save(folder / "before", step)
    number = 0
    while True:
        number += 1
        place = folder / f"{number:03d}"
        shutil.copytree(folder / "before", place)
        killed = killed_at(number, writer, place)
        assert steps(place)[-1] in lasts
        for path in complete_checkpoints(place):
            assert_whole(path)
        if not killed:
            return number - 1
        discard_all(place)
        writer(place)
        remove_old_checkpoints(place, keep_last=2)
        assert steps(place) == at_last
        assert len(list(place.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_complete_checkpoints(tmp_path: Path) -> None:
    # In a separate process, as one that has threads must not fork.
    output = finish([__file__, str(tmp_path)], tmp_path / "log")
    assert all(int(changes) >= 10 for changes in output.split()), output


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # slow, and for power cuts: kills lose nothing written
    print(kill_everywhere(write_next, Path(sys.argv[1]) / "next", {2, 3}, [2, 3]))
    print(kill_everywhere(write_again, Path(sys.argv[1]) / "again", {1, 2}, [1, 2]))
