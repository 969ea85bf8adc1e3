"""The training loop, which every stage runs on. It is the one place that calls backward."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.engine.checkpoint.best import Best, better, write_best
from simmim.engine.checkpoint.directory import TrainingState, checkpoint_path, find_checkpoint
from simmim.engine.checkpoint.ema import averaged, forget_average, update_average
from simmim.engine.checkpoint.initial import load_initial
from simmim.engine.checkpoint.saver import Saver, SavingOutcome, contents_of, restore, whole_stage
from simmim.engine.checkpoint.sharded_state import whole_tensor
from simmim.engine.distributed.parallelism import (
    sharding_left_to_us,
    synchronise_norms,
    trains_in_shards,
    without_exchange,
)
from simmim.engine.distributed.sharding import shard_for_training
from simmim.engine.distributed.signals import StopRequest
from simmim.engine.distributed.watchdog import WAITING_FOR_DATA, Watchdog, group_timeout
from simmim.engine.monitor.anomalies import Anomalies, poisoned
from simmim.engine.monitor.memory import keep_freed_memory
from simmim.engine.monitor.monitor import Position, Watcher
from simmim.engine.optimizer import (
    ParameterGroup,
    build_optimizer,
    depth_table,
    parameter_groups,
    set_learning_rate,
)
from simmim.engine.run import RunFolder
from simmim.engine.schedule import learning_rate
from simmim.engine.settings import TrainingSettings
from simmim.engine.stage import Stage
from simmim.recipe import recipe_hash


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended."""

    step: int
    """That of the last checkpoint: the last step, but where the stop's could not be written or
    steps were skipped up to it. 0 where there is none."""
    stopped: bool
    """True if a signal ended it before its last step."""
    figures: dict[str, float]
    """The last validation."""


def build_accelerator(precision: str, rank_timeout: float = 600.0) -> Accelerator:
    """Build the accelerator: this machine's devices, or its CPU, and the recipe's precision.

    Raises:
        ValueError: there is no device for that precision.
    """
    if not torch.accelerator.is_available():
        if precision == "fp16":
            raise ValueError(
                "training.precision fp16 needs a GPU, and there is none: use bf16 or fp32 on a CPU."
            )
        keep_freed_memory()
    with sharding_left_to_us():
        return Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=group_timeout(rank_timeout))],
        )


def prepare(stage: Stage, accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Move a stage's module to its devices, whole or sharded, and build the optimiser."""
    stage.module.to(accelerator.device)
    synchronise_norms(stage.module, accelerator.device, accelerator.num_processes)
    sharded = trains_in_shards(accelerator)
    if sharded:
        shard_for_training(stage.module, accelerator)
    settings = stage.recipe.training.optimizer
    groups = parameter_groups(stage.module, settings, stage.depths)
    optimizer = accelerator.prepare(build_optimizer(stage.module, settings, groups))
    return stage.module if sharded else accelerator.prepare(stage.module), optimizer


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
        with nullcontext() if last else without_exchange(module, accelerator):
            loss = module(batch.to(accelerator.device))
            accelerator.backward(poisoned(loss) / len(batches))
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(module.parameters(), clip_norm or math.inf)
    assert norm is not None
    norm = whole_tensor(torch.as_tensor(norm))
    finite = bool(norm.isfinite())
    if finite or accelerator.scaler is not None:  # the scaler of fp16 leaves steps out by itself
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return (loss_sum / len(batches) if finite else torch.full_like(loss_sum, math.nan)), norm


def train(
    stage: Stage,
    run: RunFolder,
    accelerator: Accelerator,
    resume: str | None,
    *,
    allow_changes: bool = False,
    init_from: Path | None = None,
) -> TrainingResult:
    """Train a stage to its last step, or until a signal asks to stop.

    Args:
        stage: what is trained, on what.
        run: where everything is written.
        accelerator: devices and processes.
        resume: None to start anew, `auto`, or the path of a checkpoint.
        allow_changes: go on with another batch size than that of the checkpoint.
        init_from: where the first weights are, unless a checkpoint is found; see `load_initial`.

    Raises:
        DivergedError: loss or gradient were not finite, too many steps in a row; the last
            checkpoint is from before.
        RankLostError: another process failed or is gone.
        OSError: the checkpoint of the last step cannot be written. That of a stop is only warned
            of: a restart goes on from the one before.
    """
    stop = StopRequest(group_timeout(stage.recipe.training.rank_timeout))
    trainer = _Trainer(stage, run, accelerator, stop)
    found = None if resume is None else find_checkpoint(run.checkpoints, resume)
    if found is not None:
        trainer.restore(found, allow_changes=allow_changes)
    loaded = load_initial(init_from, stage.module) if init_from and found is None else None
    stream = trainer.batches()  # refuses what cannot be dealt out, before anything is written
    if accelerator.is_main_process:
        run.begin(stage.recipe, step=trainer.step)
        write_best(run.path, trainer.best)
    accelerator.wait_for_everyone()
    with (
        stop,
        trainer.watchdog,
        closing(trainer.saver),  # a checkpoint on its way when something fails is written still
        trainer.watcher.watch(trainer.step, total=trainer.total) as watcher,
    ):
        if loaded is not None:
            watcher.say(loaded)
        if trainer.training.optimizer.layer_decay != 1:
            watcher.say(depth_table(stage.module, trainer.groups(), stage.depths))
        batches = iter(stream)
        trainer.clock.skip()
        while trainer.step < trainer.total and not trainer.must_stop():
            trainer.advance(batches)
        stopped = trainer.step < trainer.total
        stop.heeded = stopped
        if stopped:
            received = stop.received.name if stop.received else "a signal on another rank"
            watcher.say(f"{received}: stopping after step {trainer.step}, {trainer.what_is_saved}.")
        trainer.save_for_good(must=not stopped)
        trainer.watchdog.at(trainer.step, "writing the encoder" if not stopped else "ending")
        if not stopped and accelerator.is_main_process:
            with trainer.averaged():
                whole_stage(stage, checkpoint_path(run.checkpoints, trainer.step)).hand_on(
                    run, trainer.step, trainer.cursor
                )
        accelerator.wait_for_everyone()
    return TrainingResult(
        step=max(0, trainer.saved_step), stopped=stopped, figures=trainer.watcher.figures
    )


class _Trainer:
    """The state of a training, and what happens at each step."""

    def __init__(
        self, stage: Stage, run: RunFolder, accelerator: Accelerator, stop: StopRequest
    ) -> None:
        self.stage, self.run, self.accelerator, self.stop = stage, run, accelerator, stop
        self.training: TrainingSettings = stage.recipe.training
        self.total = self.training.total_steps(stage.samples_per_epoch)
        self.step = self.cursor = self.skipped = 0
        self.saved_step = -1
        self.begun_step = -1
        self.best: Best | None = None
        self.lr = 0.0
        self.losses: list[Tensor] = []
        self.watchdog = Watchdog(self.training.rank_timeout)
        self.anomalies = Anomalies(
            accelerator, stage.training_shards, run.anomalies, limit=self.training.max_nonfinite
        )
        self.watcher = Watcher(stage, run, accelerator, begin=self.watchdog.at)
        self.clock = self.watcher.clock
        self.module, self.optimizer = prepare(stage, accelerator)
        self.saver = Saver(
            run.checkpoints,
            rank=accelerator.process_index,
            keep_last=self.training.keep_last,
            keep_every=self.training.keep_every,
        )

    def groups(self) -> list[ParameterGroup]:
        """Return the parameters by what they share."""
        return parameter_groups(self.stage.module, self.training.optimizer, self.stage.depths)

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the running averages stand in the place of the weights, where there are some."""
        return nullcontext() if self.training.ema_decay is None else averaged(self.optimizer)

    @property
    def steps_per_epoch(self) -> float:
        return self.stage.samples_per_epoch / self.training.batch_size

    def batches(self) -> Iterable[Batch]:
        return self.stage.batches(
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            start=self.cursor,
            end=self.cursor + (self.total - self.step) * self.training.batch_size,
        )

    def restore(self, path: Path, *, allow_changes: bool) -> None:
        state = restore(
            path, self.stage, self.accelerator, self.optimizer, allow_changes=allow_changes
        )
        if state.cursor != state.step * self.training.batch_size:  # some had another batch size
            self.total = self.training.steps_to_the_end(
                state.step, state.cursor, self.stage.samples_per_epoch
            )
        if state.step > self.total:
            raise ValueError(
                f"{path} is of step {state.step} and training ends at step {self.total}: lengthen "
                "training.steps or training.epochs, or resume from an earlier checkpoint."
            )
        self.step = self.saved_step = self.begun_step = state.step
        self.cursor, self.skipped = state.cursor, state.skipped_steps
        if state.best is not None and checkpoint_path(path.parent, state.best.step).is_dir():
            self.best = state.best
        if self.training.ema_decay is None:
            forget_average(self.optimizer)
        self.losses = [torch.tensor(loss, device=self.accelerator.device) for loss in state.losses]

    @property
    def what_is_saved(self) -> str:
        """What happens to the present step when training stops, for a person."""
        if self.anomalies.in_a_row:
            return "a skipped one, which is not saved: the checkpoint before stays the last"
        return "writing a checkpoint"

    def must_stop(self) -> bool:
        """Meet the other ranks: was one asked to stop, and how far is the checkpoint on its way?"""
        wanted, *saving = self.stop.agree([self.stop.wanted, *self.saver.signs()])
        self._report(self.saver.heed(*saving))
        return bool(wanted)

    def advance(self, batches: Iterator[Batch]) -> None:
        """Take one step and do what is due after it."""
        training = self.training
        set_learning_rate(self.optimizer, self._learning_rate)
        self.watchdog.at(self.step + 1, WAITING_FOR_DATA)
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(training.accumulation)]
        self.clock.add(training.batch_size, time.perf_counter() - began)
        self.watchdog.at(self.step + 1, "computing")
        self.module.train()
        loss, norm = training_step(
            self.accelerator, self.module, self.optimizer, micro_batches, training.clip_norm
        )
        self.skipped += int(loss.isnan())
        self.losses.append(loss)
        self.lr = self._learning_rate(1.0)
        self.step += 1
        self.cursor += training.batch_size
        self.watchdog.at(self.step, "judging and logging the step")
        if training.ema_decay is not None and not loss.isnan():
            update_average(self.optimizer, training.ema_decay, self.step)
        self.anomalies.judge(self.step, norm, self.module, micro_batches, self.watcher.say)
        self.watcher.advance()
        if self.step % training.log_every == 0 or self.step == self.total:
            self._log(norm)
        figures = self.watcher.look(self.step, self.averaged())
        if self._is_best(figures) or self.step % training.checkpoint_every == 0:
            self.watchdog.at(self.step, "copying a checkpoint, or waiting for the one before")
            self.save()
        self.watchdog.at(self.step, "asking all ranks whether to go on")

    def _is_best(self, figures: Mapping[str, float]) -> bool:
        """Tell whether a validation is the best so far, and remember it."""
        metric = self.stage.best_metric if self.training.keep_best else None
        if metric is None or self.anomalies.in_a_row or not better(self.best, figures, metric):
            return False
        self.best = Best(step=self.step, metric=metric, value=figures[metric])
        return True

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

        That of a step which was left out is NaN.
        """
        if not self.losses:
            return torch.zeros(0)
        losses: Tensor = self.accelerator.reduce(torch.stack(self.losses), "mean").cpu()
        return losses

    def _log(self, norm: Tensor) -> None:
        loss = float(self._losses_since_log().nanmean())
        self.losses.clear()
        position = Position(
            step=self.step,
            epoch=self.cursor / self.stage.samples_per_epoch,
            samples=self.cursor,
        )
        counts = {"skipped": self.skipped}
        self.watcher.log(position, loss=loss, lr=self.lr, norm=float(norm), counts=counts)

    def save(self) -> None:
        """Begin a checkpoint of the present step, unless there is one.

        None is written between skipped steps: the next start is to be from before the first.
        """
        if self.begun_step == self.step or (self.anomalies.in_a_row and self.step < self.total):
            return
        losses = tuple(self._losses_since_log().tolist())
        self._report(self.saver.finish(self.stop.agree))
        state = TrainingState(
            step=self.step,
            cursor=self.cursor,
            total_steps=self.total,
            batch_size=self.training.batch_size,
            seed=self.training.seed,
            losses=losses,
            data_digest=self.stage.data_digest,
            recipe_hash=recipe_hash(self.stage.recipe),
            processes=self.accelerator.num_processes,
            skipped_steps=self.skipped,
            best=self.best,
        )
        contents = contents_of(self.stage, self.accelerator, self.optimizer, state)
        self.saver.start(self.step, contents, self.best)
        self.begun_step = self.step
        self.clock.skip()

    def save_for_good(self, *, must: bool) -> None:
        """Write a checkpoint of the present step and wait until it is complete.

        Raises:
            OSError: it cannot be written, and it must be.
        """
        self.watchdog.at(self.step, "writing the last checkpoint")
        self.save()
        outcome = self.saver.finish(self.stop.agree)
        self._report(outcome)
        if must and outcome is not None and not outcome.saved:
            raise OSError(f"step {outcome.step} has no checkpoint: {outcome.reason}")

    def _report(self, outcome: SavingOutcome | None) -> None:
        """Note how a checkpoint ended, and tell what could not be written or removed."""
        if outcome is None:
            return
        if outcome.saved:
            self.saved_step = outcome.step
            text = f"checkpoint {outcome.step} is complete, but {outcome.reason}"
        else:
            self.begun_step = self.saved_step
            if self.best is not None and self.best.step == outcome.step:
                self.best = None  # the next validation is the best there is a checkpoint of
            text = (
                f"the checkpoint of step {outcome.step} was not written: {outcome.reason}. Without "
                "another one a restart goes on from the one before"
            )
        if outcome.reason:
            self.watcher.say(f"WARNING: {text}.")
