"""The checkpoint that a training resumes from, or that is read: verified, and of the same run.

`--resume auto` takes the last complete checkpoint that is as it was written, and says which later
ones it has rejected. A checkpoint that is named by its path is refused instead.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from simmim.engine.checkpoint.directory import (
    AN_EARLIER_ONE,
    ANOTHER_ONE,
    COMPLETE,
    MODEL,
    OPTIMIZER,
    RECIPE_FILE,
    SCALARS_FILE,
    Scalars,
    TrainingState,
    best_checkpoint,
    check_file,
    check_small_files,
    checkpoint_path,
    complete_checkpoints,
    find_checkpoint,
    kept_best,
    load_state,
    read_best,
    read_json,
    recorded_digests,
)
from simmim.engine.checkpoint.shard_files import ShardFiles, shard_files
from simmim.engine.run import RunFolder
from simmim.environment import print_on_main
from simmim.recipe import read_values

ITS_OWN_PLACE = (
    "Give it its own name, resume it in the folder of its own run, or start a new run from its "
    "weights with --init-from."
)
"""The remedy for a checkpoint of another step or run in training."""

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


def chosen_checkpoint(source: Path, *, best: bool | None = None) -> Path:
    """Return the checkpoint at `source`, or the best or last one of a run.

    Its files without tensors are compared with their digests; those with tensors are when they are
    read.

    Args:
        source: a run folder, or a checkpoint in one.
        best: the best one of a run, or the last; None is the best if the run has kept one.

    Raises:
        ValueError: there is none, it is not what was written, or it is of another step than its
            name says or of another run than its folder.
    """
    path = _chosen(source, best).resolve()
    check_small_files(path)
    state, run = load_state(path), RunFolder(path=path.parent.parent).identity()
    reason = _why_misplaced(path, state, run)
    if reason is not None:
        raise ValueError(f"{reason} Take it from where it was written, or name another checkpoint.")
    return path


def _chosen(source: Path, best: bool | None) -> Path:
    if (source / COMPLETE).is_file():
        return source
    kept, found = kept_best(source), complete_checkpoints(source / "checkpoints")
    if best and kept is None:
        path = best_checkpoint(source)
        raise ValueError(
            f"{path}, the best checkpoint of {source}, is gone or incomplete: leave out --best for "
            "the last checkpoint."
        )
    if best or (best is None and kept is not None):
        assert kept is not None
        return kept
    if not found:
        if not source.exists():
            raise ValueError(f"{source} does not exist: give a run folder or a checkpoint in one.")
        raise ValueError(
            f"{source} holds no complete checkpoint: give a run folder or a checkpoint in one."
        )
    named = read_best(source) if best is None else None
    if named is not None:
        print_on_main(
            f"WARNING: {checkpoint_path(source / 'checkpoints', named.step)}, the best checkpoint "
            f"({named.metric} {named.value:.4f}), is gone or incomplete: {found[-1].name}, the "
            "last, is taken."
        )
    return found[-1]


def _why_unusable(path: Path, run: str, mine: range) -> str | None:
    """Return why a checkpoint cannot be resumed, if this rank finds a reason.

    Args:
        path: the checkpoint.
        run: identity of the run, or empty.
        mine: numbers of the files with tensors that this rank verifies.
    """
    try:
        misplaced = _why_misplaced(path, load_state(path), run)
        if misplaced is not None:
            return f"{misplaced} {ITS_OWN_PLACE}"
        read_json(path / SCALARS_FILE, Scalars)
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


def _why_misplaced(path: Path, state: TrainingState, run: str) -> str | None:
    """Return why a checkpoint is not of the step in its name or the run `run`, if it is not."""
    named = re.fullmatch(r"step-(\d+)", path.name)
    if named and int(named[1]) != state.step:
        return (
            f"{path} holds step {state.step} and is named otherwise: it was renamed, or copied "
            "over another."
        )
    if run and state.run and state.run != run:
        return f"{path} is of another run ({state.run}; this folder holds run {run})."
    return None
