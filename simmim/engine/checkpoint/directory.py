"""Checkpoint directories: layout, completion, and which ones are found, kept and removed.

`step-00001000/` holds `model-….safetensors` and `optimizer-….safetensors`, one file of each or one
per rank, `optimizer.json`, `state.json`, `recipe.yaml`, and the notes of the stage, if any. It is
written under a temporary name, renamed, and then marked complete; the mark holds the digests of the
other files. Nothing in it can run code.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from data_prep.bounds import Bounds, Finite, Seed, check_bounds
from data_prep.format.atomic import atomic_write_text
from data_prep.validation import parse_json
from simmim.engine.checkpoint.digests import (
    FileDigest,
    describe_difference,
    digest_file,
    join_notes,
    read_marker,
)

COMPLETE = "complete"
"""Name of the file that marks a complete checkpoint. It holds the digests of the other files; of a
checkpoint of an earlier version it is empty."""
MODEL, OPTIMIZER = "model", "optimizer"
"""Prefixes of the files with tensors."""
STATE_FILE, SCALARS_FILE, RECIPE_FILE = "state.json", "optimizer.json", "recipe.yaml"
BEST_FILE = "best.json"
"""File in the run folder that names the best checkpoint."""

ANOTHER_ONE = "Copy it again from where it was saved, or name another checkpoint."
"""The remedy for a checkpoint that cannot be read."""
AN_EARLIER_ONE = "Resume from an earlier checkpoint with --resume PATH."
"""The remedy in training."""
LARGEST = 2**63 - 1
"""Largest integer in a state."""
LARGEST_CURSOR = 2**53
"""Largest number of samples in a state; the order of the data still counts exactly far beyond."""

Content = TypeVar("Content")
Scalars = dict[str, dict[str, Any]]
"""State of the optimiser without its tensors, by the name of the parameter."""


_Whole: TypeAlias = Annotated[int, Bounds(ge=0, le=LARGEST)]
_Count: TypeAlias = Annotated[int, Bounds(ge=1, le=LARGEST)]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best validation so far."""

    step: _Whole
    metric: str
    """Name of the metric."""
    value: Finite
    """Value of the metric; higher is better."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a resumed training needs besides weights and optimiser state."""

    step: _Whole
    """Optimiser steps taken."""
    cursor: Annotated[int, Bounds(ge=0, le=LARGEST_CURSOR)]
    """Samples consumed over all ranks: the whole state of the data order."""
    total_steps: _Whole
    """Length of the schedule in steps."""
    batch_size: _Count
    """Global batch size in images."""
    seed: Seed
    """Seed of the run. All randomness is a function of it and of a sample or a step."""
    losses: tuple[Annotated[float, Bounds()], ...]
    """Losses of the steps since the last line in the metrics."""
    data_digest: str
    """Digest of the training data, in which the cursor counts."""
    recipe_hash: str
    """Hash of the recipe in force."""
    processes: _Count = 1
    """Number of processes that trained; any other number can resume."""
    scaler: dict[str, int | float] | None = None
    """State of the fp16 gradient scaler."""
    skipped_steps: _Whole = 0
    """Steps without an update, because of a non-finite loss or gradient."""
    best: Best | None = None
    """The best validation so far, whose checkpoint is kept."""
    run: str = ""
    """Identity of the run; empty in checkpoints of earlier versions."""

    def __post_init__(self) -> None:
        check_bounds(self)
        # Every step takes one sample or more, of whatever batch size it was.
        ranges = {
            "step": (self.step, 0, self.total_steps),
            "cursor": (self.cursor, self.step, LARGEST_CURSOR if self.step else 0),
            "skipped_steps": (self.skipped_steps, 0, self.step),
            "best.step": (0 if self.best is None else self.best.step, 0, self.step),
        }
        wrong = [
            f"{name} is {value}; it must be {least} to {most}"
            for name, (value, least, most) in ranges.items()
            if not least <= value <= most
        ]
        for name, number in (self.scaler or {}).items():
            if not (math.isfinite(number) and number >= 0):
                wrong.append(f"scaler.{name} is {number}; it must be finite, and 0 or more")
        if wrong:
            raise ValueError("; ".join(wrong))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def temporary_path(folder: Path, step: int) -> Path:
    """Return the path under which the checkpoint of `step` is written until all files are there."""
    path = checkpoint_path(folder, step)
    return path.with_name(f".{path.name}.writing")


def shard_path(folder: Path, kind: str, number: int, count: int) -> Path:
    """Return the path of shard file `number` of `count`: `model-00000-of-00001.safetensors`."""
    return folder / f"{kind}-{number:05d}-of-{count:05d}.safetensors"


def finish_checkpoint(folder: Path, step: int, shard_count: int) -> Path:
    """Rename the temporary folder of a checkpoint and mark it complete.

    Every rank must have written its files.

    Raises:
        OSError: a file is missing, or the disk refuses.
    """
    temporary, path = temporary_path(folder, step), checkpoint_path(folder, step)
    for kind in (MODEL, OPTIMIZER):
        for number in range(shard_count):
            file = shard_path(temporary, kind, number, shard_count)
            if not file.is_file():
                raise OSError(
                    f"{file} is missing though its process has written it: the run folder must be "
                    "on a file system that all machines share."
                )
    digests = join_notes(temporary)
    _fsync(temporary)
    if path.exists():  # left unmarked by a kill between rename and mark, or trained again
        _remove(path)
    temporary.rename(path)
    _fsync(folder)
    atomic_write_text(path / COMPLETE, digests)
    return path


def discard(folder: Path, step: int) -> None:
    """Remove the temporary folder of a checkpoint that will not be completed."""
    shutil.rmtree(temporary_path(folder, step), ignore_errors=True)


def discard_all(folder: Path) -> None:
    """Remove all temporary folders that killed processes have left; no process may be writing."""
    for path in folder.glob(".step-*"):
        if path.is_dir():
            shutil.rmtree(path)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, by rising step."""
    return [path for path in _checkpoints(folder) if (path / COMPLETE).is_file()]


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume` names; `auto` is the last complete one, if any.

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


def kept_best(run: Path) -> Path | None:
    """Return the best checkpoint of a run; None if it names none, or has it no more."""
    try:
        best = best_checkpoint(run)
    except ValueError:
        return None
    return best if (best / COMPLETE).is_file() else None


def remove_old_checkpoints(
    folder: Path, keep_last: int, keep_every: int | None = None, best: int | None = None
) -> None:
    """Remove the checkpoints that are not to be kept, and incomplete ones.

    Args:
        folder: folder of the checkpoints.
        keep_last: number of most recent complete checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this.
        best: also keep the one of this step.
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
    """Remove the checkpoints of steps after `step`, which a resumed run trains again."""
    for path in _checkpoints(folder):
        if _step(path) > step:
            _remove(path)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that cannot be used, so that it is neither found nor removed."""
    aside = path.with_name(f"rejected-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    return aside


def _checkpoints(folder: Path) -> list[Path]:
    """Return the folders named as checkpoints, complete or not, by rising step."""
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


def is_better(best: Best | None, metrics: Mapping[str, float], metric: str) -> bool:
    """Return whether a validation is better than the best one before it.

    Args:
        best: the best validation before; None if there is none.
        metrics: metrics of the validation; empty without a validation.
        metric: name of the metric that decides.
    """
    if metric not in metrics:
        return False
    if best is None or best.metric != metric:
        return True
    return metrics[metric] > best.value


def write_best(run: Path, best: Best | None) -> None:
    """Write `best.json` into a run folder; None removes it."""
    if best is None:
        (run / BEST_FILE).unlink(missing_ok=True)
        return
    named = {"checkpoint": f"checkpoints/step-{best.step:08d}", **asdict(best)}
    atomic_write_text(run / BEST_FILE, json.dumps(named, indent=1) + "\n")


def best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run.

    Raises:
        ValueError: the run names none.
    """
    step = None if (best := read_best(run)) is None else best.step
    if step is None:
        raise ValueError(
            f"{run} names no best checkpoint: train with training.keep_best true and validation "
            "data, or leave out --best for the last checkpoint."
        )
    return checkpoint_path(run / "checkpoints", step)


def read_best(run: Path) -> Best | None:
    """Return what `best.json` in a run folder says; None if there is none, or it cannot be read."""
    try:
        return parse_json((run / BEST_FILE).read_bytes(), Best)
    except (OSError, ValueError):
        return None


def load_state(path: Path) -> TrainingState:
    """Read the training state of a checkpoint.

    Raises:
        ValueError: the file cannot be read, is not what was written, or does not hold a training
            state.
    """
    return read_json(path / STATE_FILE, TrainingState)


def read_json(file: Path, content: type[Content]) -> Content:
    """Read a JSON file of a checkpoint and validate its content and its digest.

    Raises:
        ValueError: the file cannot be read, has other content, or is not what was written.
    """
    try:
        found = parse_json(file.read_bytes(), content)
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        check_file(file)
        return found
    raise ValueError(unreadable_message(file, reason))


def recorded_digests(path: Path) -> dict[str, FileDigest] | None:
    """Return the digests that a checkpoint recorded of its files, by name.

    None if there are none: it is of an earlier version, or `path` is not a checkpoint.

    Raises:
        ValueError: they cannot be read.
    """
    if not (path / COMPLETE).is_file():
        return None
    try:
        digests = read_marker(path / COMPLETE)
        if digests is None and _names_its_run(path):
            raise ValueError("it is empty, and digests of the checkpoint's files were written")
    except ValueError as error:
        raise ValueError(unreadable_message(path / COMPLETE, str(error))) from None
    return digests


def _names_its_run(path: Path) -> bool:
    """Return whether a checkpoint is of a version that recorded runs, and with them digests."""
    try:
        return bool(json.loads((path / STATE_FILE).read_bytes()).get("run"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # whoever reads the state says what is wrong


def check_small_files(path: Path) -> None:
    """Compare the files of a checkpoint without tensors, such as its recipe, with their digests.

    Raises:
        ValueError: one is missing, cannot be read, or is not what was written.
    """
    for name in sorted(recorded_digests(path) or {}):
        if not name.endswith(".safetensors"):
            check_file(path / name)


def check_file(file: Path) -> None:
    """Compare a file of a checkpoint with its digest, if the checkpoint recorded one.

    Raises:
        ValueError: it is missing, cannot be read, or is not what was written.
    """
    digests = recorded_digests(file.parent)
    if digests is None:
        return
    try:
        recorded = digests.get(file.name)
        reason = (
            "it does not belong to this checkpoint"
            if recorded is None
            else describe_difference(recorded, digest_file(file))
        )
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason is not None:
        raise ValueError(unreadable_message(file, reason))


def unreadable_message(path: Path, reason: str) -> str:
    """Return the error message for a part of a checkpoint that cannot be read."""
    return f"{path} cannot be read: {reason}. {ANOTHER_ONE}"
