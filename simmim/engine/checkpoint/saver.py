"""Saving in the background: a step waits for a copy of the tensors, and a thread writes them.

Every rank writes what it holds. At the start of later steps all ranks agree on whether all have
finished; then rank 0 completes the checkpoint, in its thread too, and removes old ones. If writing
failed on any rank the checkpoint is discarded with a warning, and training continues.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.disk import why_not_written
from simmim.engine.checkpoint.digests import FileDigest, digest_text, note_digests
from simmim.engine.checkpoint.directory import (
    MODEL,
    OPTIMIZER,
    RECIPE_FILE,
    SCALARS_FILE,
    STATE_FILE,
    Best,
    TrainingState,
    discard,
    finish_checkpoint,
    remove_old_checkpoints,
    shard_path,
    temporary_path,
    write_best,
)
from simmim.engine.checkpoint.ema import RunningAverage
from simmim.engine.checkpoint.shard_files import TensorShard, write_shards
from simmim.engine.checkpoint.sharded_state import (
    is_sharded,
    model_shards,
    optimizer_scalars,
    optimizer_shards,
)

Agree = Callable[[Sequence[int]], list[int]]
"""Returns the maximum of each integer over all ranks, which must call it together."""


@dataclass(frozen=True, kw_only=True)
class RankContents:
    """Contents that one rank writes into a checkpoint."""

    shard: int
    """Number of its shard files."""
    shard_count: int
    """Number of ranks that write shard files."""
    model: Mapping[str, TensorShard]
    optimizer: Mapping[str, TensorShard]
    """State of the optimiser, and running averages of the weights."""
    texts: Mapping[str, str]
    """Content of the other files by name; rank 0 writes them."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        shards = [*self.model.values(), *self.optimizer.values()]
        return sum(shard.rows.nbytes for shard in shards)


def rank_contents(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    state: TrainingState,
    recipe: str,
    *,
    notes: Mapping[str, str] | None = None,
    average: RunningAverage | None = None,
) -> RankContents:
    """Return the contents of the checkpoint of `state` for this rank; all ranks call it together.

    The tensors are the trained ones themselves, not copies.
    """
    rank = accelerator.process_index
    if accelerator.scaler is not None:
        state = replace(state, scaler=accelerator.scaler.state_dict())
    texts = {
        SCALARS_FILE: json.dumps(optimizer_scalars(optimizer)),
        STATE_FILE: json.dumps(asdict(state), indent=2),
        RECIPE_FILE: recipe,
        **(notes or {}),
    }
    averages = {} if average is None else average.shards(rank)
    sharded = is_sharded(module)
    return RankContents(
        shard=rank if sharded else 0,
        shard_count=accelerator.num_processes if sharded else 1,
        model=model_shards(module, rank),
        optimizer=optimizer_shards(optimizer, rank) | averages,
        texts=texts if rank == 0 else {},
    )


def write_contents(folder: Path, step: int, contents: RankContents) -> None:
    """Write the contents of one rank to the temporary folder of a checkpoint and flush it to disk.

    Raises:
        OSError: a file cannot be written.
    """
    temporary = temporary_path(folder, step)
    temporary.mkdir(parents=True, exist_ok=True)
    digests: dict[str, FileDigest] = {}
    for kind, shards in ((MODEL, contents.model), (OPTIMIZER, contents.optimizer)):
        file = shard_path(temporary, kind, contents.shard, contents.shard_count)
        with _naming(file):
            digests[file.name] = write_shards(file, shards)
    for name, text in contents.texts.items():
        file = temporary / name
        with _naming(file), file.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        digests[name] = digest_text(text)
    with _naming(temporary):
        note_digests(temporary, contents.shard, digests)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"{file} cannot be written ({error.strerror}); is the disk full?"
        ) from error


class HostCopies:
    """Buffers in host memory for the tensors to write, reused from one checkpoint to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, shards: Mapping[str, TensorShard], prefix: str) -> dict[str, TensorShard]:
        """Copy shards to the host; copies from a GPU are asynchronous, see `wait`."""
        copied = {}
        for name, shard in shards.items():
            buffer = self._buffer(f"{prefix}/{name}", shard.rows)
            buffer.copy_(shard.rows, non_blocking=True)
            copied[name] = replace(shard, rows=buffer)
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
    """How the writing of one checkpoint ended."""

    step: int
    saved: bool
    """Whether the checkpoint is complete; the same on every rank."""
    reason: str = ""
    """Reason why it is not, or failure after it was complete, as far as this rank knows."""


@dataclass
class _Writing:
    """A checkpoint that is being written."""

    contents: RankContents
    step: int
    future: "Future[None] | None"
    """Current work of this rank's thread; None if it is idle."""
    best: Best | None
    """The best validation so far."""
    completing: bool = False
    """All ranks have written their files, and rank 0 completes the checkpoint."""
    warning: str = ""
    """Failure after the checkpoint was complete."""


class Saver:
    """Writer of the checkpoints of a run, one at a time.

    At every step all ranks agree on their `flags` and pass the result to `update`.
    """

    def __init__(
        self, folder: Path, *, rank: int = 0, keep_last: int, keep_every: int | None = None
    ) -> None:
        self.folder, self.rank = folder, rank
        self.keep_last, self.keep_every = keep_last, keep_every
        self.copies = HostCopies()
        self._writing: _Writing | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def start(self, step: int, contents: RankContents, best: Best | None = None) -> None:
        """Copy the tensors of this rank and start writing them; no other write may be in progress.

        Once the checkpoint is complete, the one of `best` is kept and named in the run.
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

    def flags(self) -> tuple[int, int]:
        """Return whether this rank is still writing, and whether its writing failed."""
        future = None if self._writing is None else self._writing.future
        if future is None:
            return 0, 0
        if not future.done():
            return 1, 0
        return 0, int(_failure(future) is not None)

    def update(self, still_writing: int, failed: int) -> SavingOutcome | None:
        """Complete or discard the checkpoint, as the flags of all ranks require.

        Args:
            still_writing: whether any rank is.
            failed: whether writing failed on any rank.

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
        return SavingOutcome(step=writing.step, saved=True, reason=writing.warning)

    def _complete(self, writing: _Writing) -> None:
        finish_checkpoint(self.folder, writing.step, writing.contents.shard_count)
        best_step = None if writing.best is None else writing.best.step
        warning = "best.json cannot be written"
        try:
            if writing.best is not None:
                write_best(self.folder.parent, writing.best)
            warning = "old checkpoints cannot be removed"
            remove_old_checkpoints(self.folder, self.keep_last, self.keep_every, best_step)
        except OSError as error:
            writing.warning = f"{warning}: {error}"

    def finish(self, agree: Agree) -> SavingOutcome | None:
        """Wait for the checkpoint in progress, if any; all ranks must call this together."""
        outcome = None
        while self._writing is not None:
            if self._writing.future is not None:
                self._writing.future.exception()  # waits
            outcome = self.update(*agree(self.flags()))
        return outcome

    def close(self) -> None:
        """Stop the thread once it has finished its work."""
        self._thread.shutdown(wait=True)


def _failure(future: "Future[None]") -> OSError | None:
    """Return the OSError that ended a thread's work; raise any other error: it is a bug."""
    error = future.exception()
    if error is not None and not isinstance(error, OSError):
        raise error
    return error
