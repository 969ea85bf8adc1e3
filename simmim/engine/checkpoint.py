"""Checkpoints: written aside, renamed, then marked complete; the last complete one is found."""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from swinv2.weights import atomic_folder, atomic_write_text, load_strictly, write_tensors

COMPLETE = "complete"
UNREADABLE = (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, UnpicklingError)
"""What a damaged pickle may raise."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where training stands; with weights and optimiser it is all that going on needs."""

    step: int
    """Optimiser steps taken."""
    cursor: int
    """Samples consumed, over all ranks: the whole state of the data order."""
    total_steps: int
    """The schedule's horizon in steps."""
    batch_size: int
    """Global batch size in images."""
    seed: int
    """The random state: each step's generators are seeded with (seed, step, rank)."""
    losses: tuple[float, ...]
    """Losses of the steps since the last line in the metrics."""
    data_digest: str
    """Digest of the training shards: the cursor means nothing in others."""
    recipe_hash: str
    """Hash of the recipe in force."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> Path:
    """Write the checkpoint of `state.step` so that a kill at any moment leaves the old ones.

    Raises:
        OSError: it cannot be written, for want of space for example.
    """
    path = checkpoint_path(folder, state.step)
    if path.exists():  # left unmarked by a kill between rename and mark, or taken again
        _remove(path)
    with atomic_folder(path) as partial:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        write_tensors(partial / "model.safetensors", tensors)
        _write_pickle(partial / "optimizer.pt", optimizer.state_dict())
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    atomic_write_text(path / COMPLETE, "")
    return path


def _write_pickle(file: Path, content: dict[str, Any]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch hides what the system said
        raise OSError(f"{file} cannot be written; is the disk full? ({error})") from error


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, by rising step."""
    return [path for path in _checkpoints(folder) if (path / COMPLETE).is_file()]


def remove_old_checkpoints(folder: Path, keep_last: int) -> None:
    """Remove all but the last `keep_last` complete checkpoints, and what kills left behind."""
    complete = complete_checkpoints(folder)
    for path in _checkpoints(folder):
        if path not in complete[-keep_last:]:
            _remove(path)
    for path in folder.glob(".step-*"):
        if path.is_dir():  # written or removed by a process that was killed
            shutil.rmtree(path)


def remove_later_checkpoints(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps after `step`: a run that goes on from it takes them again."""
    for path in _checkpoints(folder):
        if _step(path) > step:
            _remove(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, complete or not, by rising step; no other names."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in named if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    # Renamed first: a kill in between must not leave half of a checkpoint that is marked complete.
    removed = path.with_name(f".{path.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    path.rename(removed)
    shutil.rmtree(removed)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume` names: `auto` is the last complete one, if any.

    Raises:
        ValueError: `resume` is a path without a complete checkpoint.
    """
    if resume == "auto":
        found = complete_checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not (path / COMPLETE).is_file():
        raise ValueError(
            f"{path} is not a complete checkpoint. Give a folder like "
            f"{checkpoint_path(folder, 1000)}, or --resume auto for the last complete one."
        )
    return path


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint.

    Raises:
        ValueError: the file cannot be read, or a tensor is missing, unexpected or does not fit.
    """
    file = path / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        _refuse(file, error)
    load_strictly(model, tensors, str(file))


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state of a checkpoint, each parameter's by its name.

    Weight decay, betas and the like stay those of `optimizer`: the recipe has the last word.

    Raises:
        ValueError: the file cannot be read, or lacks a parameter of `optimizer`.
    """
    file = path / "optimizer.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        numbers = _numbers(saved)
        states = saved["state"]
    except UNREADABLE as error:
        _refuse(file, error)
    present = optimizer.state_dict()
    missing = sorted(set(_numbers(present)) - set(numbers))
    if missing:
        raise ValueError(
            f"{file} lacks the state of {', '.join(missing)}: it is of another model. "
            "Resume with the recipe of that run."
        )
    present["state"] = {
        number: states[numbers[name]]
        for name, number in _numbers(present).items()
        if numbers[name] in states  # an optimiser that took no step has none
    }
    optimizer.load_state_dict(present)


def _numbers(state: dict[str, Any]) -> dict[str, int]:
    """Return under which number an optimiser's state holds each named parameter."""
    return {
        name: number
        for group in state["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }


def load_state(path: Path) -> TrainingState:
    """Read where the training of a checkpoint stood.

    Raises:
        ValueError: the file cannot be read, or does not hold such a state.
    """
    file = path / "state.json"
    try:
        return TypeAdapter(TrainingState).validate_json(file.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        _refuse(file, error)


def _refuse(file: Path, error: Exception) -> NoReturn:
    if isinstance(error, ValidationError):
        mistakes = [(".".join(map(str, found["loc"])), found["msg"]) for found in error.errors()]
        reason = "; ".join(f"{where}: {what}" if where else what for where, what in mistakes)
    else:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
        f"{file} cannot be read: {reason}. Resume from an earlier checkpoint with --resume PATH."
    ) from None
