"""Checkpoints in the background: a step waits for a copy of the tensors, a thread writes them.

Every process writes what it holds. All agree at the start of a later step that all have written;
then rank 0 completes the checkpoint, in its thread too, and removes old ones. A write that failed
on any rank is discarded and told of, and training goes on with the checkpoints it has.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.disk import why_not_written
from simmim.engine.checkpoint.best import Best, write_best
from simmim.engine.checkpoint.directory import (
    RECIPE_FILE,
    Contents,
    TrainingState,
    discard,
    finish_checkpoint,
    load_model,
    load_optimizer,
    load_state,
    remove_old_checkpoints,
    texts_of,
    write_contents,
)
from simmim.engine.checkpoint.ema import load_average
from simmim.engine.checkpoint.shard_files import Piece
from simmim.engine.checkpoint.sharded_state import is_sharded, model_pieces, optimizer_pieces
from simmim.recipe import read_values, to_yaml

Agree = Callable[[Sequence[int]], list[int]]
"""Takes one integer or more from every rank, all together, and returns the largest of each."""


class HostCopies:
    """Memory of the host that tensors are copied to, kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, pieces: Mapping[str, Piece], prefix: str) -> dict[str, Piece]:
        """Copy pieces to the host; from a GPU without waiting, so `wait` before reading them."""
        copied = {}
        for name, piece in pieces.items():
            buffer = self._buffer(f"{prefix}/{name}", piece.rows)
            buffer.copy_(piece.rows, non_blocking=True)
            copied[name] = replace(piece, rows=buffer)
        return copied

    def wait(self) -> None:
        """Wait until all copies from a GPU have arrived."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        known = self._buffers.get(name)
        if known is None or known.shape != like.shape or known.dtype != like.dtype:
            known = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = known
        return known


@dataclass(frozen=True, kw_only=True)
class SavingOutcome:
    """How the writing of one checkpoint ended; the same on every rank."""

    step: int
    saved: bool
    reason: str = ""
    """Why not, or what failed after it was complete, as this rank knows it."""


@dataclass
class _Writing:
    """A checkpoint that is being written."""

    contents: Contents
    step: int
    future: "Future[None] | None"
    """What this rank's thread does; None where it does nothing."""
    best: Best | None
    """The best checkpoint by then."""
    completing: bool = False
    """All ranks have written, and rank 0 completes it."""
    trouble: str = ""
    """What failed once it was complete."""


class Saver:
    """Writes the checkpoints of a run, one at a time.

    `heed` is called at every step, on all ranks together, with what they have agreed on; `signs` is
    what each brings to that.
    """

    def __init__(
        self, folder: Path, *, rank: int = 0, keep_last: int, keep_every: int | None = None
    ) -> None:
        self.folder, self.rank = folder, rank
        self.keep_last, self.keep_every = keep_last, keep_every
        self.copies = HostCopies()
        self._writing: _Writing | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    @property
    def is_writing(self) -> bool:
        """Tell whether a checkpoint is on its way to disk; the same on all ranks."""
        return self._writing is not None

    def start(self, step: int, contents: Contents, best: Best | None = None) -> None:
        """Copy what this process holds, and let the thread write it; none may be on its way.

        The checkpoint of `best` is kept once this one is complete, and the run names it then.
        """
        assert self._writing is None
        copied = replace(
            contents,
            model=self.copies.copy(contents.model, "model"),
            optimizer=self.copies.copy(contents.optimizer, "optimizer"),
        )
        self.copies.wait()
        future = None
        if copied.model or copied.optimizer or copied.texts:
            future = self._thread.submit(write_contents, self.folder, step, copied)
        self._writing = _Writing(contents=copied, step=step, future=future, best=best)

    def signs(self) -> tuple[int, int]:
        """Return whether this rank is still writing, and whether its writing failed."""
        future = None if self._writing is None else self._writing.future
        if future is None:
            return 0, 0
        if not future.done():
            return 1, 0
        return 0, int(_failure(future) is not None)

    def heed(self, still_writing: int, failed: int) -> SavingOutcome | None:
        """Do what follows from the signs of all ranks, the largest of each.

        Returns:
            How a checkpoint ended, once it has; rank 0 has marked it by then.
        """
        writing = self._writing
        if writing is None or still_writing:
            return None
        if failed:
            error = None if writing.future is None else _failure(writing.future)
            reason = error and why_not_written(error, self.folder, writing.contents.nbytes)
            self._writing = None
            if self.rank == 0:
                discard(self.folder, writing.step)
            return SavingOutcome(
                step=writing.step, saved=False, reason=reason or "another rank failed to write"
            )
        if not writing.completing:
            writing.completing = True
            writing.future = None
            if self.rank == 0:
                writing.future = self._thread.submit(self._complete, writing)
            return None
        self._writing = None
        return SavingOutcome(step=writing.step, saved=True, reason=writing.trouble)

    def _complete(self, writing: _Writing) -> None:
        finish_checkpoint(self.folder, writing.step, writing.contents.parts)
        kept = None if writing.best is None else writing.best.step
        trouble = "the best one cannot be named"
        try:
            if writing.best is not None:
                write_best(self.folder.parent, writing.best)
            trouble = "old checkpoints cannot be removed"
            remove_old_checkpoints(self.folder, self.keep_last, self.keep_every, kept)
        except OSError as error:
            writing.trouble = f"{trouble}: {error}"

    def finish(self, agree: Agree) -> SavingOutcome | None:
        """Wait for the checkpoint that is on its way; all ranks must call it together."""
        outcome = None
        while self._writing is not None:
            if self._writing.future is not None:
                self._writing.future.exception()  # waits
            outcome = self.heed(*agree(self.signs()))
        return outcome

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._thread.shutdown(wait=True)


def _failure(future: "Future[None]") -> OSError | None:
    """Return why a thread that has ended could not write.

    What is no mistake of the disk's is raised: one in this code must not pass for a full disk.
    """
    error = future.exception()
    if error is not None and not isinstance(error, OSError):
        raise error
    return error


AnyStage = TypeVar("AnyStage", bound="Trained")


class Trained(Protocol):
    """What of a stage is saved and restored; see `simmim.engine.loop.Stage`."""

    @property
    def recipe(self) -> Any:
        """The recipe, with its training settings."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    @property
    def data_digest(self) -> str:
        """Digest of the shards that are trained on."""

    def fresh(self) -> Any:
        """Return a stage of the same recipe, with initial weights on the CPU."""


def contents_of(
    stage: Trained,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
) -> Contents:
    """Return what this process writes into the checkpoint of `state`; all ranks call it together.

    Its tensors are the ones that are trained, where they are.
    """
    rank = accelerator.process_index
    if accelerator.scaler is not None:
        state = replace(state, scaler=accelerator.scaler.state_dict())
    sharded = is_sharded(stage.module)
    return Contents(
        part=rank if sharded else 0,
        parts=accelerator.num_processes if sharded else 1,
        model=model_pieces(stage.module, rank),
        optimizer=optimizer_pieces(optimizer, rank),
        texts=texts_of(optimizer, state, to_yaml(stage.recipe)) if rank == 0 else {},
    )


def restore(
    path: Path,
    stage: Trained,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    *,
    allow_changes: bool,
) -> TrainingState:
    """Load a checkpoint into what is trained, whatever number of processes wrote it.

    Raises:
        ValueError: it is of another model or does not fit, or cannot be read.
    """
    state = fitting_state(path, stage, allow_changes=allow_changes)
    load_model(path, stage.module)
    load_optimizer(path, optimizer)
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
    return state


def fitting_state(path: Path, stage: Trained, *, allow_changes: bool) -> TrainingState:
    """Return where the training of a checkpoint stood, where that of `stage` can go on from it.

    Raises:
        ValueError: it is of other data or another optimiser, of another batch size unless changes
            are allowed, or cannot be read.
    """
    state = load_state(path)
    batch_size = stage.recipe.training.batch_size
    if state.batch_size != batch_size and not allow_changes:
        raise ValueError(
            f"{path} was trained with batch size {state.batch_size}, the recipe says {batch_size}: "
            "steps and learning rate would mean something else. Set it back, or accept this with "
            "--allow-recipe-changes."
        )
    if state.data_digest != stage.data_digest:
        raise ValueError(
            f"{path} was trained on other images than the recipe names now (other shards, or a "
            "folder whose files have changed since); its place in the data would be lost. Name the "
            "images it was started with, or start another run."
        )
    wanted = stage.recipe.training.optimizer.name
    saved = read_values(path / RECIPE_FILE)["training"]["optimizer"].get("name", wanted)
    if saved != wanted:
        raise ValueError(
            f"{path} holds the state of the optimiser {saved}, the recipe says {wanted}: set "
            f"training.optimizer.name to {saved}, or start anew from its weights with --init-from."
        )
    return state


def whole_stage(stage: AnyStage, checkpoint: Path) -> AnyStage:
    """Return a stage that holds all its weights: itself, or one anew with those of `checkpoint`.

    Averages stand in their place in the latter, where the checkpoint has some.
    """
    if not is_sharded(stage.module):
        return stage
    again: AnyStage = stage.fresh()
    load_model(checkpoint, again.module)
    load_average(checkpoint, again.module)
    return again
