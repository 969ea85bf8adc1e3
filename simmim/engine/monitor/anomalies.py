"""Non-finite (NaN or Inf) steps: skip, log, stop after N in a row."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from data_prep.format.text import count_noun
from simmim.data.loader.batch import Batch
from simmim.data.order.source import SampleSource
from simmim.disk import append_line, skip_if_unwritable
from simmim.engine.checkpoint.sharded_state import local_tensor
from simmim.engine.distributed.sharding import gathered

Cause = Literal["loss", "gradient", "weights"]

NAMED_ON_SCREEN = 4
"""Number of samples that a warning names; the file names all."""


class DivergedError(ValueError):
    """Loss or gradient were non-finite in too many steps in a row."""


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """A line of `anomalies.jsonl`: what one rank found in a skipped step."""

    step: int
    rank: int
    what: Cause
    """What is non-finite: the loss of these samples; the gradient alone, in which case all
    samples of the rank are listed; or the weights, in which case every sample looks bad."""
    samples: tuple[str, ...]
    """Shard and key of each."""
    in_a_row: int
    """Number of consecutive skipped steps, this one included."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Make a non-finite loss produce a non-finite gradient.

    An infinite loss may have a finite gradient. With this, the norm of the gradient, which is the
    same on all ranks, reveals a non-finite loss on any rank without further communication. A finite
    loss and its gradient are multiplied by one.
    """
    return loss * (1 + 0 * loss.detach())


class Anomalies:
    """Record of non-finite steps; all ranks use it together.

    Args:
        accelerator: devices and processes.
        shards: the training data, for the names of samples.
        path: path of `anomalies.jsonl`.
        limit: number of consecutive skipped steps that ends training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        shards: SampleSource[Any],
        path: Path,
        *,
        limit: int,
    ) -> None:
        self.accelerator = accelerator
        self.shards = shards
        self.path = path
        self.limit = limit
        self.in_a_row = 0
        """Number of skipped steps since the last good one."""

    def check(
        self,
        step: int,
        norm: float,
        module: nn.Module,
        batches: Sequence[Batch],
        warn: Callable[[str], None],
    ) -> None:
        """Check the gradient norm of a step, and explain a non-finite one.

        Args:
            step: number of the step.
            norm: norm of the whole gradient.
            module: the trained module; it recomputes the loss of each sample.
            batches: micro-batches of this rank.
            warn: prints a warning.

        Raises:
            DivergedError: this is the last of too many skipped steps in a row.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return
        if self._is_overflow():
            return
        self.in_a_row += 1
        found = self._explain(step, module, batches)
        if self.accelerator.is_main_process:
            self._write(found)
        warn(self._warning(found))
        if self.in_a_row >= self.limit:
            raise DivergedError(self._verdict(step, found))

    def _is_overflow(self) -> bool:
        """Return whether the fp16 scaler, which searches for the largest usable scale, did this."""
        scaler = self.accelerator.scaler
        return scaler is not None and float(scaler.get_scale()) >= 1.0

    def _explain(self, step: int, module: nn.Module, batches: Sequence[Batch]) -> list[Anomaly]:
        """Check the samples one by one on every rank; return the anomalies of all ranks."""
        bare = self.accelerator.unwrap_model(module)
        weights_finite = all(
            bool(local_tensor(weight).isfinite().all()) for weight in bare.parameters()
        )
        what: Cause
        if self._on_any_rank(not weights_finite):
            what, samples = "weights", []
        else:
            # Every rank checks all its samples: sharded weights are gathered from all ranks.
            samples = [name for batch in batches for name in self._without_a_loss(bare, batch)]
            what = "loss" if self._on_any_rank(bool(samples)) else "gradient"
        if what == "gradient":
            samples = [name for batch in batches for name in self._names(batch)]
        own = Anomaly(
            step=step,
            rank=self.accelerator.process_index,
            what=what,
            samples=tuple(samples),
            in_a_row=self.in_a_row,
        )
        everyone: list[Anomaly] = gather_object([own])
        return [one for one in everyone if one.samples] or everyone[:1]

    def _on_any_rank(self, flag: bool) -> bool:
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum") > 0)

    @torch.no_grad()
    def _without_a_loss(self, module: nn.Module, batch: Batch) -> list[str]:
        training = module.training
        module.eval()
        batch = batch.to(self.accelerator.device)
        # Compiled blocks would be compiled again for a batch of one. What a forward gathers of
        # sharded weights must not stay: the next one would use it after these have changed.
        with torch.compiler.set_stance("force_eager"), gathered(module):
            finite = [math.isfinite(float(module(batch.only(row)))) for row in range(len(batch))]
        module.train(training)
        return [name for name, good in zip(self._names(batch), finite, strict=True) if not good]

    def _names(self, batch: Batch) -> list[str]:
        return [self._name(shard, sample) for _, shard, sample in batch.addresses.tolist()]

    def _name(self, shard: int, sample: int) -> str:
        try:
            return self.shards.name(shard, sample)
        except ValueError:  # the shard has disappeared since
            return f"shard {shard}, sample {sample}"

    def _write(self, found: Sequence[Anomaly]) -> None:
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
        with (
            skip_if_unwritable("a line of anomalies", self.path),
            self.path.open("ab", buffering=0) as file,
        ):
            append_line(file, lines.encode())

    def _warning(self, found: Sequence[Anomaly]) -> str:
        first = found[0]
        samples = [name for one in found for name in one.samples]
        more = (
            f" and {len(samples) - NAMED_ON_SCREEN} more" if len(samples) > NAMED_ON_SCREEN else ""
        )
        match first.what:
            case "weights":
                reason = "the weights are no longer finite: an earlier step corrupted them"
            case "loss":
                reason = f"the loss of {', '.join(samples[:NAMED_ON_SCREEN])}{more} is not finite"
            case "gradient":
                number = count_noun(len(samples), "sample")
                reason = f"the gradient over {number} is not finite"
        return (
            f"WARNING: step {first.step} was skipped on all ranks: {reason}"
            f" ({first.in_a_row} in a row; {self.limit} end training). See {self.path}."
        )

    def _verdict(self, step: int, found: Sequence[Anomaly]) -> str:
        return (
            f"{self.limit} steps in a row, up to step {step}, were skipped because the"
            f" {found[0].what} was not finite; {self.path} names the samples. The last checkpoint"
            " is from before the first of them, and --resume auto resumes from it. Lower"
            " training.optimizer.lr or training.clip_norm, or lengthen the warm-up (with"
            " --allow-recipe-changes), or remove the named samples; if the weights were already"
            " corrupted, resume from an earlier checkpoint with --resume PATH."
        )
