"""The training loop: the one place that calls backward. Every stage runs on it."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from simmim.data.bad_samples import BadSamples
from simmim.data.batches import Batch
from simmim.data.mixture import Shards
from simmim.disk import goes_on_without
from simmim.engine.anomalies import Anomalies, poisoned
from simmim.engine.checkpoint import (
    TrainingState,
    find_checkpoint,
    load_model,
    load_optimizer,
    load_state,
    remove_old_checkpoints,
    save_checkpoint,
)
from simmim.engine.memory import keep_freed_memory
from simmim.engine.optimizer import (
    OptimizerSettings,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from simmim.engine.progress import Bar, Clock
from simmim.engine.run import RunFolder
from simmim.engine.schedule import ScheduleSettings, learning_rate
from simmim.engine.signals import StopRequest
from simmim.engine.watchdog import Watchdog, group_timeout
from simmim.recipe import recipe_hash, settings


@settings
class TrainingSettings:
    """How long and how a stage is trained."""

    batch_size: int
    """Images an optimiser step, over all processes."""
    epochs: float | None = None
    """Length of training in passes over the data; either this or steps."""
    steps: int | None = None
    """Length of training in optimiser steps; either this or epochs."""
    accumulation: int = 1
    """Parts that a process cuts its share of a batch into, one forward and backward each."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser are always float32."""
    clip_norm: float | None = 5.0
    """Largest norm of the whole gradient; null does not clip."""
    max_nonfinite: int = 10
    """Steps in a row that are skipped for a loss or gradient that is no number before training
    ends. Skipped steps leave the weights as they are, on all ranks."""
    rank_timeout: float = 600.0
    """Seconds that a process may make no progress while others wait for it; then the job ends.
    No step, validation, checkpoint or compilation may take longer."""
    seed: int = 0
    """Seed of the initial weights, the data order, augmentation, masks and drop path."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 3
    """Checkpoints kept."""
    validate_every: int = 500
    """Steps between validations; there is one at the end too."""
    look_every: int = 500
    """Steps between pictures, for a stage that draws some; there is one at the end too."""
    optimizer: OptimizerSettings
    """The optimiser."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over time."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, the length of training.")
        positive: tuple[str, ...] = ("batch_size", "epochs", "steps", "accumulation", "clip_norm")
        positive += ("keep_last", "max_nonfinite", "rank_timeout")
        intervals = ("log_every", "checkpoint_every", "validate_every", "look_every")
        for name in positive + intervals:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must fit into 64 bits.")

    def total_steps(self, samples_per_epoch: int) -> int:
        """Return the number of optimiser steps."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples_per_epoch / self.batch_size))


class Stage(Protocol):
    """What a job brings to the training loop."""

    @property
    def recipe(self) -> Any:
        """The recipe, with a `training: TrainingSettings`."""

    @property
    def module(self) -> nn.Module:
        """Takes a Batch on its device and returns the mean loss over it, a scalar."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each encoder stage, for layer-wise learning rates."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples that the data order visits in one epoch."""

    @property
    def data_digest(self) -> str:
        """Digest of the shards that are trained on."""

    @property
    def training_shards(self) -> Shards:
        """The shards that are trained on: what an address in a batch counts in."""

    @property
    def bad_samples(self) -> BadSamples:
        """The account of samples that could not be read."""

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches, from `start` to `end` samples of the global stream."""

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return figures on held-out data, the same on every rank; empty if there is none."""

    def look(self, run: RunFolder, step: int) -> None:
        """Draw pictures into the run; called on the main process alone."""

    def hand_on(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder into the run; called on the main process, at the end."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended."""

    step: int
    stopped: bool
    """True if a signal ended it before its last step; there is a checkpoint to go on from."""
    figures: dict[str, float]
    """The last validation."""


def build_accelerator(precision: str, rank_timeout: float = 600.0) -> Accelerator:
    """Build the accelerator: this machine's devices, or its CPU, and the recipe's precision."""
    if not torch.accelerator.is_available():
        keep_freed_memory()
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=group_timeout(rank_timeout))],
    )


def training_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    clip_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step over the micro-batches of one batch.

    Where the loss or the gradient is no number, on any rank, all of them leave out the step:
    weights and the optimiser's state stay as they were.

    Returns:
        The mean loss of this rank's share, NaN if the step was left out, and the norm of the whole
        gradient before clipping, both on the device.
    """
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        # Ranks exchange gradients once a step, with the last part.
        with nullcontext() if last else accelerator.no_sync(module):
            loss = module(batch.to(accelerator.device))
            accelerator.backward(poisoned(loss) / len(batches))
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(module.parameters(), clip_norm or math.inf)
    assert norm is not None
    norm = torch.as_tensor(norm)
    finite = bool(norm.isfinite())
    if finite or accelerator.scaler is not None:  # the scaler of fp16 leaves steps out by itself
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return (loss_sum / len(batches) if finite else torch.full_like(loss_sum, math.nan)), norm


def train(
    stage: Stage, run: RunFolder, accelerator: Accelerator, resume: str | None
) -> TrainingResult:
    """Train a stage to its last step, or until a signal asks to stop.

    Args:
        stage: what is trained, on what.
        run: where everything is written.
        accelerator: devices and processes.
        resume: None to start anew, `auto`, or the path of a checkpoint.

    Raises:
        DivergedError: loss or gradient were not finite, too many steps in a row; the last
            checkpoint is from before.
        RankLostError: another process failed or is gone.
    """
    trainer = _Trainer(stage, run, accelerator)
    if resume is not None:
        trainer.restore(find_checkpoint(run.checkpoints, resume))
    stream = trainer.batches()  # refuses what cannot be dealt out, before anything is written
    if accelerator.is_main_process:
        run.begin(stage.recipe, step=trainer.step)
    accelerator.wait_for_everyone()
    bar = Bar(trainer.total, trainer.step, visible=accelerator.is_main_process, label=run.path.name)
    limit = group_timeout(trainer.training.rank_timeout).total_seconds()
    with StopRequest(limit) as stop, trainer.watchdog, bar:
        batches = iter(stream)
        trainer.clock.skip()
        while trainer.step < trainer.total and not stop.agreed():
            trainer.advance(batches, bar)
        stopped = trainer.step < trainer.total
        if stopped:
            received = stop.received.name if stop.received else "a signal on another rank"
            bar.say(f"{received}: stopping after step {trainer.step}, writing a checkpoint.")
        trainer.save()
        if not stopped and accelerator.is_main_process:
            stage.hand_on(run, trainer.step, trainer.cursor)
        accelerator.wait_for_everyone()
    return TrainingResult(step=trainer.step, stopped=stopped, figures=trainer.figures)


class _Trainer:
    """The state of a training, and what happens at each step."""

    def __init__(self, stage: Stage, run: RunFolder, accelerator: Accelerator) -> None:
        self.stage, self.run, self.accelerator = stage, run, accelerator
        self.training: TrainingSettings = stage.recipe.training
        self.total = self.training.total_steps(stage.samples_per_epoch)
        self.step = 0
        self.saved_step = -1
        self.lr = 0.0
        self.figures: dict[str, float] = {}
        self.losses: list[Tensor] = []
        self.clock = Clock()
        self.watchdog = Watchdog(self.training.rank_timeout)
        self.anomalies = Anomalies(
            accelerator, stage.training_shards, run.anomalies, limit=self.training.max_nonfinite
        )
        stage.module.to(accelerator.device)
        groups = parameter_groups(stage.module, self.training.optimizer, stage.depths)
        optimizer = build_optimizer(stage.module, self.training.optimizer, groups)
        self.module, self.optimizer = accelerator.prepare(stage.module, optimizer)

    @property
    def cursor(self) -> int:
        return self.step * self.training.batch_size

    @property
    def steps_per_epoch(self) -> float:
        return self.stage.samples_per_epoch / self.training.batch_size

    def batches(self) -> Iterable[Batch]:
        return self.stage.batches(
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            start=self.cursor,
            end=self.total * self.training.batch_size,
        )

    def restore(self, path: Any) -> None:
        if path is None:
            return
        state = load_state(path)
        if state.batch_size != self.training.batch_size:
            raise ValueError(
                f"{path} was trained with batch size {state.batch_size}, the recipe says "
                f"{self.training.batch_size}; its place in the data would be lost."
            )
        if state.data_digest != self.stage.data_digest:
            raise ValueError(
                f"{path} was trained on other shards than the recipe names now; its place in the "
                "data would be lost. Name the shards it was started with, or start another run."
            )
        if state.step > self.total:
            raise ValueError(
                f"{path} is of step {state.step} and training ends at step {self.total}: lengthen "
                "training.steps or training.epochs, or resume from an earlier checkpoint."
            )
        load_model(path, self.accelerator.unwrap_model(self.module))
        load_optimizer(path, self.optimizer)
        self.step = self.saved_step = state.step
        self.losses = [torch.tensor(loss, device=self.accelerator.device) for loss in state.losses]

    def advance(self, batches: Iterator[Batch], bar: Bar) -> None:
        """Take one step and do what is due after it."""
        training = self.training
        torch.manual_seed(step_seed(training.seed, self.step, self.accelerator.process_index))
        set_learning_rate(self.optimizer, self._learning_rate)
        self.watchdog.at(self.step + 1, "waiting for data")
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(training.accumulation)]
        self.clock.add(training.batch_size, time.perf_counter() - began)
        self.watchdog.at(self.step + 1, "computing")
        self.module.train()
        loss, norm = training_step(
            self.accelerator, self.module, self.optimizer, micro_batches, training.clip_norm
        )
        self.losses.append(loss)
        self.lr = self._learning_rate(1.0)
        self.step += 1
        self.watchdog.at(self.step, "looking at what is due: log, validation, checkpoint")
        self.anomalies.judge(self.step, norm, self.module, micro_batches, bar.say)
        bar.advance()
        if self._due(training.log_every):
            self._log(norm, bar)
        if self._due(training.validate_every):
            self._validate(bar)
        if self._due(training.look_every) and self.accelerator.is_main_process:
            with goes_on_without("a picture", self.run.reconstructions):
                self.stage.look(self.run, self.step)
            self.clock.skip()
        if self.step % training.checkpoint_every == 0:
            self.save()
        self.watchdog.at(self.step, "asking all ranks whether to go on")

    def _learning_rate(self, factor: float) -> float:
        """Return the rate of a layer: its factor scales the peak, but neither end."""
        return learning_rate(
            self.training.schedule,
            self.step,
            peak=self.training.optimizer.lr * factor,
            total_steps=self.total,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total

    def _losses_since_log(self) -> Tensor:
        """Return the losses of the steps since the last log, each the mean over ranks.

        That of a step which was left out is NaN.
        """
        if not self.losses:
            return torch.zeros(0)
        losses: Tensor = self.accelerator.reduce(torch.stack(self.losses), "mean").cpu()
        return losses

    def _log(self, norm: Tensor, bar: Bar) -> None:
        losses = self._losses_since_log()
        loss = float(losses.nanmean())
        self.losses.clear()
        images_per_second, data_wait = self.clock.read()
        bar.show(loss, self.lr, images_per_second, data_wait)
        if self.accelerator.is_main_process:
            self.run.log(
                {
                    "step": self.step,
                    "epoch": round(self.step / self.steps_per_epoch, 4),
                    "samples": self.cursor,
                    "loss": loss,
                    "lr": self.lr,
                    "grad_norm": float(norm),
                    "skipped": int(losses.isnan().sum()),
                    "images_per_second": round(images_per_second, 2),
                    "data_wait": round(data_wait, 4),
                    "processes": self.accelerator.num_processes,
                }
            )

    def _validate(self, bar: Bar) -> None:
        self.module.eval()
        with torch.no_grad():
            self.figures = self.stage.validate(self.accelerator)
        if self.figures:
            listed = ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
            bar.say(f"step {self.step}: {listed}")
            if self.accelerator.is_main_process:
                self.run.log({"step": self.step, **self.figures})
        self.clock.skip()

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one.

        None is written between skipped steps: the next start is to be from before the first.
        """
        if self.saved_step == self.step or (self.anomalies.in_a_row and self.step < self.total):
            return
        losses = tuple(self._losses_since_log().tolist())
        if self.accelerator.is_main_process:
            state = TrainingState(
                step=self.step,
                cursor=self.cursor,
                total_steps=self.total,
                batch_size=self.training.batch_size,
                seed=self.training.seed,
                losses=losses,
                data_digest=self.stage.data_digest,
                recipe_hash=recipe_hash(self.stage.recipe),
            )
            model = self.accelerator.unwrap_model(self.module)
            save_checkpoint(self.run.checkpoints, model, self.optimizer, state)
            remove_old_checkpoints(self.run.checkpoints, self.training.keep_last)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.step
        self.clock.skip()


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of everything random in the model at one step, drop path for example.

    A pure function, so that a resumed run draws what the uninterrupted one would have drawn.
    """
    mixed = (seed * 1_000_003 + step) * 65_537 + rank
    return mixed % (2**63)
