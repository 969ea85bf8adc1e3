"""The training loop: the one place that calls backward. Every stage runs on it."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.batches import Batch
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
from simmim.engine.run import RunFolder
from simmim.engine.schedule import ScheduleSettings, learning_rate
from simmim.engine.signals import StopRequest
from simmim.engine.stage import Stage
from simmim.engine.tracking import Trackers
from simmim.engine.watching import Position, Watcher
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
    trackers: Trackers = "auto"
    """Where metrics go beside metrics.jsonl: auto is TensorBoard where it is installed; or a list
    of tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio; [] is none."""
    optimizer: OptimizerSettings
    """The optimiser."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over time."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, the length of training.")
        positive = ("batch_size", "epochs", "steps", "accumulation", "clip_norm", "keep_last")
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


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended."""

    step: int
    stopped: bool
    """True if a signal ended it before its last step; there is a checkpoint to go on from."""
    figures: dict[str, float]
    """The last validation."""


class DivergedError(ValueError):
    """The loss is no longer a number."""


def build_accelerator(precision: str) -> Accelerator:
    """Build the accelerator: this machine's devices, or its CPU, and the recipe's precision."""
    if not torch.accelerator.is_available():
        keep_freed_memory()
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
    )


def training_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    clip_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step over the micro-batches of one batch.

    Returns:
        The mean loss of this rank's share and the norm of the whole gradient before clipping,
        both on the device.
    """
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        # Ranks exchange gradients once a step, with the last part.
        with nullcontext() if last else accelerator.no_sync(module):
            loss = module(batch.to(accelerator.device))
            accelerator.backward(loss / len(batches))
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(module.parameters(), clip_norm or math.inf)
    assert norm is not None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum / len(batches), torch.as_tensor(norm)


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
        DivergedError: the loss is not finite; the last checkpoint is from before.
    """
    trainer = _Trainer(stage, run, accelerator)
    if resume is not None:
        trainer.restore(find_checkpoint(run.checkpoints, resume))
    stream = trainer.batches()  # refuses what cannot be dealt out, before anything is written
    if accelerator.is_main_process:
        run.begin(stage.recipe, step=trainer.step)
    accelerator.wait_for_everyone()
    with StopRequest() as stop, trainer.watcher.watch(trainer.step) as watcher:
        batches = iter(stream)
        trainer.clock.skip()
        while trainer.step < trainer.total and not stop.agreed():
            trainer.advance(batches)
        stopped = trainer.step < trainer.total
        if stopped:
            received = stop.received.name if stop.received else "a signal on another rank"
            watcher.say(f"{received}: stopping after step {trainer.step}, writing a checkpoint.")
        trainer.save()
    if not stopped and accelerator.is_main_process:
        stage.hand_on(run, trainer.step, trainer.cursor)
    accelerator.wait_for_everyone()
    return TrainingResult(step=trainer.step, stopped=stopped, figures=trainer.watcher.figures)


class _Trainer:
    """The state of a training, and what happens at each step."""

    def __init__(self, stage: Stage, run: RunFolder, accelerator: Accelerator) -> None:
        self.stage, self.run, self.accelerator = stage, run, accelerator
        self.training: TrainingSettings = stage.recipe.training
        self.total = self.training.total_steps(stage.samples_per_epoch)
        self.step = 0
        self.saved_step = -1
        self.lr = 0.0
        self.losses: list[Tensor] = []
        self.watcher = Watcher(stage, run, accelerator, total=self.total)
        self.clock = self.watcher.clock
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

    def advance(self, batches: Iterator[Batch]) -> None:
        """Take one step and do what is due after it."""
        training = self.training
        torch.manual_seed(step_seed(training.seed, self.step, self.accelerator.process_index))
        set_learning_rate(self.optimizer, self._learning_rate)
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(training.accumulation)]
        self.clock.add(training.batch_size, time.perf_counter() - began)
        self.module.train()
        loss, norm = training_step(
            self.accelerator, self.module, self.optimizer, micro_batches, training.clip_norm
        )
        self.losses.append(loss)
        self.lr = self._learning_rate(1.0)
        self.step += 1
        self.watcher.advance()
        if self.step % training.log_every == 0 or self.step == self.total:
            self._log(norm)
        self.watcher.look(self.step)
        if self.step % training.checkpoint_every == 0:
            self.save()

    def _learning_rate(self, factor: float) -> float:
        """Return the rate of a layer: its factor scales the peak, but neither end."""
        return learning_rate(
            self.training.schedule,
            self.step,
            peak=self.training.optimizer.lr * factor,
            total_steps=self.total,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _losses_since_log(self) -> Tensor:
        """Return the losses of the steps since the last log, each the mean over ranks.

        Raises:
            DivergedError: one is not finite.
        """
        if not self.losses:
            return torch.zeros(0)
        losses: Tensor = self.accelerator.reduce(torch.stack(self.losses), "mean").cpu()
        if not losses.isfinite().all():
            raise DivergedError(
                f"the loss is not finite at step {self.step}; nothing was saved since the last "
                f"checkpoint in {self.run.checkpoints}. Lower training.optimizer.lr or "
                "training.clip_norm, or lengthen the warm-up, and go on from there."
            )
        return losses

    def _log(self, norm: Tensor) -> None:
        loss = float(self._losses_since_log().mean())
        self.losses.clear()
        position = Position(
            step=self.step, epoch=self.step / self.steps_per_epoch, samples=self.cursor
        )
        self.watcher.log(position, loss=loss, lr=self.lr, norm=float(norm))

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if self.saved_step == self.step:
            return
        # Weights after a loss that is no number are not worth keeping: this raises before.
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
