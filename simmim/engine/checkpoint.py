"""Checkpoints: written aside, renamed, then marked complete; the last complete one is found."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swinv2.weights import atomic_folder, atomic_write_text, load_strictly

COMPLETE = "complete"


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
    recipe_hash: str
    """Hash of the recipe in force."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> Path:
    """Write the checkpoint of `state.step` so that a kill at any moment leaves the old ones."""
    path = checkpoint_path(folder, state.step)
    if path.exists():  # left unmarked by a kill between rename and mark, or already complete
        shutil.rmtree(path)
    with atomic_folder(path) as partial:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial / "model.safetensors")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    atomic_write_text(path / COMPLETE, "")
    return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, by rising step."""
    found = [path.parent for path in folder.glob(f"step-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def remove_old_checkpoints(folder: Path, keep_last: int) -> None:
    """Remove all but the last `keep_last` complete checkpoints, and what kills left behind."""
    for path in complete_checkpoints(folder)[:-keep_last]:
        (path / COMPLETE).unlink()
        shutil.rmtree(path)
    for path in [*folder.glob(".step-*"), *folder.glob("step-*")]:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


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
    """Load the weights of a checkpoint; each tensor must be there and fit."""
    tensors: dict[str, Tensor] = load_file(path / "model.safetensors")
    load_strictly(model, tensors, str(path / "model.safetensors"))


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state of a checkpoint."""
    loaded = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(loaded)


def load_state(path: Path) -> TrainingState:
    """Read where the training of a checkpoint stood.

    Raises:
        ValueError: the file does not hold such a state.
    """
    file = path / "state.json"
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return TrainingState(**values)
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} does not hold a training state: {error}.") from None
