"""The checkpoint that a training resumes from: verified, and of the same run.

`--resume auto` takes the last complete checkpoint that is as it was written, and says which later
ones it has rejected. A checkpoint that is named by its path is refused instead.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from simmim.engine.checkpoint.directory import (
    AN_EARLIER_ONE,
    ANOTHER_ONE,
    MODEL,
    OPTIMIZER,
    RECIPE_FILE,
    SCALARS_FILE,
    Scalars,
    TrainingState,
    check_file,
    complete_checkpoints,
    find_checkpoint,
    load_state,
    read_json,
    recorded_digests,
)
from simmim.engine.checkpoint.shard_files import ShardFiles, shard_files
from simmim.recipe import read_values

Gather = Callable[[str | None], list[str | None]]
"""Returns what every rank passes to it; all ranks must call it together."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The checkpoint to resume from, and the later ones that cannot be used."""

    path: Path | None
    """None if the run has no checkpoint yet."""
    rejected: dict[Path, str] = field(default_factory=dict)
    """Reason why each later checkpoint cannot be used."""

    @property
    def warning(self) -> str | None:
        """A message on the rejected checkpoints; None if there are none."""
        if not self.rejected:
            return None
        listed = "".join(f"\n  {reason}" for reason in self.rejected.values())
        return (
            f"WARNING: {len(self.rejected)} of the checkpoints cannot be used:{listed}\n"
            f"Training resumes from the one before, {self.path}."
        )


def choose_checkpoint(
    folder: Path,
    resume: str | None,
    *,
    run: str = "",
    tensors: bool = True,
    rank: int = 0,
    world: int = 1,
    gather: Gather = lambda reason: [reason],
) -> Choice:
    """Return the checkpoint that `resume` names, verified.

    Args:
        folder: folder of the checkpoints.
        resume: None, a path, or `auto` for the last checkpoint that can be used.
        run: identity of the run in whose folder training resumes; empty if it has none.
        tensors: also verify the files with tensors, which takes about a second for each GiB.
        rank: number of this process.
        world: number of processes; each verifies some of the files.
        gather: how processes share what they found.

    Raises:
        ValueError: the checkpoint at a path cannot be used, or none of several; with the reasons.
    """
    if resume is None:
        return Choice(path=None)
    found = find_checkpoint(folder, resume)
    if found is None:
        return Choice(path=None)
    rejected: dict[Path, str] = {}
    for path in reversed(complete_checkpoints(folder)) if resume == "auto" else [found]:
        mine = range(rank, sys.maxsize, world) if tensors else range(0)
        reasons = gather(_why_unusable(path, run, mine))
        reason = next((reason for reason in reasons if reason), None)
        if reason is None:
            return Choice(path=path, rejected=rejected)
        rejected[path] = reason
    listed = "\n  ".join(rejected.values())
    if resume != "auto":
        raise ValueError(f"{listed} {AN_EARLIER_ONE}")
    raise ValueError(
        f"no checkpoint in {folder} can be used:\n  {listed}\n"
        "Copy them again from where they were saved, or start a new run with --folder."
    )


def _why_unusable(path: Path, run: str, mine: range) -> str | None:
    """Return why a checkpoint cannot be resumed, if this rank finds a reason.

    Args:
        path: the checkpoint.
        run: identity of the run, or empty.
        mine: numbers of the files with tensors that this rank verifies.
    """
    try:
        _check_identity(path, load_state(path), run)
        read_json(path / SCALARS_FILE, TypeAdapter(Scalars))
        check_file(path / RECIPE_FILE)
        read_values(path / RECIPE_FILE)
        large = [file for kind in (MODEL, OPTIMIZER) for file in shard_files(path, kind)]
        for name in (recorded_digests(path) or {}).keys() - {file.name for file in large}:
            check_file(path / name)
        for number, file in enumerate(large):
            if number in mine:
                check_file(file)
        if 0 in mine:
            for kind in (MODEL, OPTIMIZER):
                ShardFiles(path, kind, verified=True).close()  # row ranges
    except ValueError as error:
        return str(error).removesuffix(f" {ANOTHER_ONE}")
    return None


def _check_identity(path: Path, state: TrainingState, run: str) -> None:
    """Check that a checkpoint is of the step in its name and of the run `run`."""
    named = re.fullmatch(r"step-(\d+)", path.name)
    if named and int(named[1]) != state.step:
        raise ValueError(
            f"{path} holds step {state.step} and is named otherwise: it was renamed, or copied "
            "over another. Give it its own name."
        )
    if run and state.run and state.run != run:
        raise ValueError(
            f"{path} is of another run ({state.run}; this folder holds run {run}). Resume it in "
            "the folder of that run, or start a new one from its weights with --init-from."
        )
