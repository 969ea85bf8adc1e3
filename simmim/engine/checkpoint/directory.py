"""Checkpoints: written aside, renamed, then marked complete; the last complete one is found.

`step-00001000/` holds `model-….safetensors` and `optimizer-….safetensors`, one part of each or one
for each process that holds rows, `optimizer.json`, `state.json` and `recipe.yaml`. Any number of
processes loads what any number wrote, and nothing in it can run code.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from data_prep.format.atomic import atomic_write_text
from simmim.engine.checkpoint.best import Best, best_checkpoint
from simmim.engine.checkpoint.shard_files import Parts, Piece, part_path, write_part
from simmim.engine.checkpoint.sharded_state import (
    model_pieces,
    optimizer_pieces,
    optimizer_values,
    restore_model,
    restore_optimizer,
)

COMPLETE = "complete"
MODEL, OPTIMIZER = "model", "optimizer"
STATE_FILE, VALUES_FILE, RECIPE_FILE = "state.json", "optimizer.json", "recipe.yaml"


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
    """The random state: everything drawn is a function of it and of a sample or a step."""
    losses: tuple[float, ...]
    """Losses of the steps since the last line in the metrics."""
    data_digest: str
    """Digest of the training shards: the cursor means nothing in others."""
    recipe_hash: str
    """Hash of the recipe in force."""
    processes: int = 1
    """That trained it; any other number goes on from it."""
    scaler: dict[str, int | float] | None = None
    """State of the gradient scaler in fp16."""
    skipped_steps: int = 0
    """Steps without an update, for a loss or gradient that was no number."""
    best: Best | None = None
    """The best validation so far, whose checkpoint is kept."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What one process writes into a checkpoint; its tensors lie on the CPU."""

    part: int
    """Number of its part."""
    parts: int
    """How many there are."""
    model: Mapping[str, Piece]
    optimizer: Mapping[str, Piece]
    texts: Mapping[str, str]
    """Other files by their name, from rank 0."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        pieces = [*self.model.values(), *self.optimizer.values()]
        return sum(piece.rows.nbytes for piece in pieces)


def texts_of(optimizer: torch.optim.Optimizer, state: TrainingState, recipe: str) -> dict[str, str]:
    """Return the files of a checkpoint besides its tensors, by name."""
    return {
        VALUES_FILE: json.dumps(optimizer_values(optimizer)),
        STATE_FILE: json.dumps(asdict(state), indent=2),
        RECIPE_FILE: recipe,
    }


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    recipe: str = "",
) -> Path:
    """Write the checkpoint of `state.step` from the one process that trains.

    A kill at any moment leaves the earlier ones. `simmim.engine.checkpoint.saver` does it in the
    background and from several processes.

    Raises:
        OSError: it cannot be written, for want of space for example.
    """
    contents = Contents(
        part=0,
        parts=1,
        model=model_pieces(model, 0),
        optimizer=optimizer_pieces(optimizer, 0),
        texts=texts_of(optimizer, state, recipe),
    )
    try:
        write_contents(folder, state.step, contents)
    except BaseException:
        discard(folder, state.step)
        raise
    return finish_checkpoint(folder, state.step, contents.parts)


def write_contents(folder: Path, step: int, contents: Contents) -> None:
    """Write what one process holds, aside; it is on disk at the return.

    Raises:
        OSError: it cannot be written.
    """
    aside = _aside(folder, step)
    aside.mkdir(parents=True, exist_ok=True)
    for kind, pieces in ((MODEL, contents.model), (OPTIMIZER, contents.optimizer)):
        file = part_path(aside, kind, contents.part, contents.parts)
        with _named(file):
            write_part(file, pieces)
    for name, text in contents.texts.items():
        with _named(aside / name):
            _write_text(aside / name, text)


def finish_checkpoint(folder: Path, step: int, parts: int) -> Path:
    """Give the folder that was written aside its name, and mark it; all parts are written by now.

    Raises:
        OSError: parts are missing, or the disk does not take it.
    """
    aside, path = _aside(folder, step), checkpoint_path(folder, step)
    for kind in (MODEL, OPTIMIZER):
        for number in range(parts):
            file = part_path(aside, kind, number, parts)
            if not file.is_file():
                raise OSError(
                    f"{file} is missing though its process has written it: the run folder must be "
                    "on a file system that all machines share."
                )
    _fsync(aside)
    if path.exists():  # left unmarked by a kill between rename and mark, or taken again
        _remove(path)
    aside.rename(path)
    _fsync(folder)
    atomic_write_text(path / COMPLETE, "")
    return path


def discard(folder: Path, step: int) -> None:
    """Remove what was written aside for a checkpoint that will not be completed."""
    shutil.rmtree(_aside(folder, step), ignore_errors=True)


def discard_all(folder: Path) -> None:
    """Remove all that killed processes have left aside; no process may be writing."""
    for path in folder.glob(".step-*"):
        if path.is_dir():
            shutil.rmtree(path)


def _aside(folder: Path, step: int) -> Path:
    path = checkpoint_path(folder, step)
    return path.with_name(f".{path.name}.writing")


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"{file} cannot be written ({error.strerror}); is the disk full?"
        ) from error


def _write_text(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, by rising step."""
    return [path for path in _checkpoints(folder) if (path / COMPLETE).is_file()]


def remove_old_checkpoints(
    folder: Path, keep_last: int, keep_every: int | None = None, best: int | None = None
) -> None:
    """Remove all but the last `keep_last` complete checkpoints and those of every so many steps.

    That of the step `best` stays, and folders that kills left unmarked go.
    """
    found = complete_checkpoints(folder)
    kept = set(found[-keep_last:])
    if best is not None:
        kept.add(checkpoint_path(folder, best))
    if keep_every is not None:
        kept |= {path for path in found if _step(path) % keep_every == 0}
    for path in _checkpoints(folder):
        if path not in kept:
            _remove(path)


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


def chosen_checkpoint(source: Path, *, best: bool) -> Path:
    """Return the checkpoint that is meant.

    Args:
        source: a run folder, or a checkpoint in one.
        best: take the best checkpoint of the run instead of the last.

    Raises:
        ValueError: there is none.
    """
    if (source / COMPLETE).is_file():
        return source.resolve()
    if best:
        return best_checkpoint(source).resolve()
    found = complete_checkpoints(source / "checkpoints")
    if not found:
        raise ValueError(
            f"{source} holds no complete checkpoint: give a run folder or a checkpoint in one."
        )
    return found[-1].resolve()


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint.

    Raises:
        ValueError: a file cannot be read, or a tensor is missing, unexpected or does not fit.
    """
    with Parts(path, MODEL) as parts:
        restore_model(model, parts)


def read_model(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, whole and on the CPU.

    Raises:
        ValueError: a file cannot be read.
    """
    with Parts(path, MODEL) as parts:
        return parts.read_all()


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state of a checkpoint, each parameter's by its name.

    Weight decay, betas and the like stay those of `optimizer`: the recipe has the last word.

    Raises:
        ValueError: a file cannot be read, or lacks a parameter of `optimizer`.
    """
    values = read_values_of_optimizer(path)
    with Parts(path, OPTIMIZER) as parts:
        restore_optimizer(optimizer, parts, values)


def read_values_of_optimizer(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the optimiser's state holds besides tensors, by parameter.

    Raises:
        ValueError: the file cannot be read.
    """
    file = path / VALUES_FILE
    try:
        return TypeAdapter(dict[str, dict[str, Any]]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        _refuse(file, error)


def load_state(path: Path) -> TrainingState:
    """Read where the training of a checkpoint stood.

    Raises:
        ValueError: the file cannot be read, or does not hold such a state.
    """
    file = path / STATE_FILE
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
