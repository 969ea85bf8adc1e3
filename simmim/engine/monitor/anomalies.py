"""Steps whose loss or gradient is no number: skipped, explained, and too many in a row refused."""

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
from torch.distributed.tensor import DTensor

from simmim.data.loader.batch import Batch
from simmim.data.order.source import SampleSource
from simmim.disk import append_whole, goes_on_without

What = Literal["loss", "gradient", "weights"]

NAMED_ON_SCREEN = 4
"""Samples that a warning names; the file names all."""


class DivergedError(ValueError):
    """The loss or the gradient is no number, step after step."""


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """A line of `anomalies.jsonl`: what one rank knows of a step that was skipped."""

    step: int
    rank: int
    what: What
    """What is not finite: the loss of the samples; the gradient alone, and these are all samples
    of the rank; or the weights already, which makes every sample look bad."""
    samples: tuple[str, ...]
    """Shard and key of each."""
    in_a_row: int
    """Skipped steps up to this one, without a good one between."""


def poisoned(loss: Tensor) -> Tensor:
    """Return the loss such that one that is no number has a gradient that is none.

    An infinite loss may have a finite gradient. With this the norm of the gradient, which is the
    same on all ranks, tells of every rank's loss, and nothing else needs to be exchanged. A finite
    loss and its gradient are multiplied by one.
    """
    return loss * (1 + 0 * loss.detach())


class Anomalies:
    """Watches the gradient's norm of every step. All ranks use it together.

    Args:
        accelerator: the ranks.
        shards: that samples are named in.
        path: of `anomalies.jsonl`.
        limit: skipped steps in a row that end training.
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
        """Skipped steps since the last good one."""

    def judge(
        self,
        step: int,
        norm: Tensor,
        module: nn.Module,
        batches: Sequence[Batch],
        say: Callable[[str], None],
    ) -> None:
        """Take note of a step that was taken, or skipped for a norm that is no number.

        Args:
            step: its number.
            norm: of the whole gradient.
            module: what was trained; it is asked again for the loss of each sample.
            batches: of this rank.
            say: tells a person.

        Raises:
            DivergedError: it is the last of too many in a row.
        """
        if math.isfinite(float(norm)):
            self.in_a_row = 0
            return
        if self._is_overflow():
            return
        self.in_a_row += 1
        found = self._explain(step, module, batches)
        if self.accelerator.is_main_process:
            self._write(found)
        say(self._warning(found))
        if self.in_a_row >= self.limit:
            raise DivergedError(self._verdict(step, found))

    def _is_overflow(self) -> bool:
        """Tell whether this is the fp16 scaler at work, which looks for the largest good scale."""
        scaler = self.accelerator.scaler
        return scaler is not None and float(scaler.get_scale()) >= 1.0

    def _explain(self, step: int, module: nn.Module, batches: Sequence[Batch]) -> list[Anomaly]:
        """Return what all ranks find when they look at their samples one by one."""
        bare = self.accelerator.unwrap_model(module)
        held = (
            weight.to_local() if isinstance(weight, DTensor) else weight
            for weight in bare.parameters()
        )
        spoilt = not all(bool(weight.isfinite().all()) for weight in held)
        what: What
        if self._on_any_rank(spoilt):
            what, samples = "weights", []
        else:
            # Every rank asks for each of its samples: sharded weights come from all of them.
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
        # Compiled blocks would be compiled again for a batch of one.
        with torch.compiler.set_stance("force_eager"):
            finite = [math.isfinite(float(module(batch.only(row)))) for row in range(len(batch))]
        module.train(training)
        return [name for name, good in zip(self._names(batch), finite, strict=True) if not good]

    def _names(self, batch: Batch) -> list[str]:
        return [self._name(shard, sample) for _, shard, sample in batch.addresses.tolist()]

    def _name(self, shard: int, sample: int) -> str:
        try:
            return self.shards.name(shard, sample)
        except ValueError:  # the shard is gone meanwhile
            return f"shard {shard}, sample {sample}"

    def _write(self, found: Sequence[Anomaly]) -> None:
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
        with (
            goes_on_without("a line of anomalies", self.path),
            self.path.open("ab", buffering=0) as file,
        ):
            append_whole(file, lines.encode())

    def _warning(self, found: Sequence[Anomaly]) -> str:
        first = found[0]
        samples = [name for one in found for name in one.samples]
        more = (
            f" and {len(samples) - NAMED_ON_SCREEN} more" if len(samples) > NAMED_ON_SCREEN else ""
        )
        match first.what:
            case "weights":
                reason = "the weights are no longer finite: an earlier step spoiled them"
            case "loss":
                reason = f"the loss of {', '.join(samples[:NAMED_ON_SCREEN])}{more} is not finite"
            case "gradient":
                reason = f"the gradient over {len(samples)} samples is not finite"
        return (
            f"WARNING: step {first.step} was skipped on all ranks: {reason}"
            f" ({first.in_a_row} in a row; {self.limit} end training). See {self.path}."
        )

    def _verdict(self, step: int, found: Sequence[Anomaly]) -> str:
        return (
            f"{self.limit} steps in a row, up to step {step}, were skipped because the"
            f" {found[0].what} was not finite; {self.path} names the samples, and no checkpoint"
            " was written since the first of them. --resume auto goes back to the one before. Lower"
            " training.optimizer.lr or training.clip_norm, or lengthen the warm-up (with"
            " --allow-recipe-changes), or leave out the named samples; if the weights were spoiled"
            " already, resume from an earlier checkpoint with --resume PATH."
        )
