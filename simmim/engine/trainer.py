"""State of a training, and the bookkeeping between its steps."""

import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.data.loader.stream_batches import StreamBatches
from simmim.engine.checkpoint.choosing import Choice, choose_checkpoint
from simmim.engine.checkpoint.directory import (
    COMPLETE,
    Best,
    TrainingState,
    checkpoint_path,
    is_better,
    set_aside,
    write_best,
)
from simmim.engine.checkpoint.ema import RunningAverage
from simmim.engine.checkpoint.resume import load_initial, restore
from simmim.engine.checkpoint.saver import Saver, SavingOutcome, rank_contents
from simmim.engine.compiling import CompiledBlocks
from simmim.engine.devices import HostCopy
from simmim.engine.distributed.signals import StopRequest
from simmim.engine.distributed.watchdog import WAITING_FOR_DATA, Watchdog
from simmim.engine.monitor.anomalies import Anomalies
from simmim.engine.monitor.monitor import Monitor, ReportWriter, TrainingPosition
from simmim.engine.optimizer import layer_table, parameter_groups
from simmim.engine.run import RunFolder
from simmim.engine.schedule import learning_rate
from simmim.engine.settings import TrainingSettings
from simmim.engine.stage import TrainingStage
from simmim.recipe import recipe_hash, to_yaml


@dataclass(frozen=True)
class TakenStep:
    """A step that the device has been given, and whose result has not been looked at."""

    step: int
    norm: HostCopy
    """Norm of the whole gradient."""
    micro_batches: list[Batch]


class Trainer:
    """State of a training: position, losses, checkpoints and best validation.

    Args:
        stage: model, data and recipe.
        run: folder of the run.
        accelerator: devices and processes.
        module: module of the stage, prepared for the devices.
        optimizer: the optimiser of its parameters.
        stop: the stop request of this training.
        write_report: writes the report of the run; None writes none.
    """

    def __init__(
        self,
        stage: TrainingStage,
        run: RunFolder,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stop: StopRequest,
        write_report: ReportWriter | None,
    ) -> None:
        self.stage, self.run, self.accelerator, self.stop = stage, run, accelerator, stop
        self.module, self.optimizer = module, optimizer
        self.settings: TrainingSettings = stage.recipe.training
        kept = self.settings.ema_decay is not None
        self.average = RunningAverage(optimizer) if kept else None
        self.total = self.settings.total_steps(stage.order.samples_per_epoch)
        self.step = self.cursor = self.skipped = 0
        self.saved_step = -1
        """Step of the last complete checkpoint; -1 if there is none."""
        self.begun_step = -1
        """Step of the last checkpoint that was begun."""
        self.best: Best | None = None
        self.identity = run.identity() or secrets.token_hex(8)
        """Identity of the run, as rank 0 writes it; a resumed run keeps its own."""
        self.chosen = Choice(path=None)
        self.lr = 0.0
        self.losses: list[Tensor] = []
        self.norm = math.nan
        """Norm of the gradient of the last settled step."""
        self._taken: TakenStep | None = None
        self._stream: StreamBatches | None = None
        self.compiled = CompiledBlocks(stage.module)
        self.watchdog = Watchdog(self.settings.rank_timeout)
        self.anomalies = Anomalies(
            accelerator, stage.training_shards, run.anomalies, limit=self.settings.max_nonfinite
        )
        self.monitor = Monitor(
            stage, run, accelerator, begin=self.watchdog.at, write_report=write_report
        )
        self.saver = Saver(
            run.checkpoints,
            rank=accelerator.process_index,
            keep_last=self.settings.keep_last,
            keep_every=self.settings.keep_every,
        )

    def layer_table(self) -> str | None:
        """Return the table of layer-wise learning rates; None if all layers have the same."""
        settings, module = self.settings.optimizer, self.stage.module
        if settings.layer_decay == 1:
            return None
        return layer_table(module, parameter_groups(module, settings))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Return a context in which the weights are their averages, if these are kept."""
        self.settle()
        with nullcontext() if self.average is None else self.average.swapped():
            yield

    def batches(self) -> Iterable[Batch]:
        """Return this rank's micro-batches from the current position to the last step."""
        batches = self.stage.batches(
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            start=self.cursor,
            end=self.cursor + (self.total - self.step) * self.settings.batch_size,
        )
        self._stream = batches if isinstance(batches, StreamBatches) else None
        return batches

    def load_weights(
        self, resume: str | None, init_from: Path | None, *, allow_changes: bool
    ) -> str | None:
        """Resume from a checkpoint, or else load initial weights.

        Args:
            resume: None, `auto`, or the path of a checkpoint; see `choose_checkpoint`.
            init_from: initial weights if no checkpoint is resumed; see `load_initial`.
            allow_changes: resume with another batch size than the checkpoint's.

        Returns:
            A message on rejected checkpoints, or on the initial weights that were loaded, if any.
        """
        self.chosen = choose_checkpoint(
            self.run.checkpoints,
            resume,
            run=self.run.identity(),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            gather=lambda reason: gather_object([reason]),
        )
        if self.chosen.path is not None:
            if self.chosen.rejected:  # its recipe has not been compared yet
                self.run.check(
                    self.stage.recipe,
                    resume=True,
                    checkpoint=self.chosen.path,
                    allow_changes=allow_changes,
                )
            self.restore(self.chosen.path, allow_changes=allow_changes)
            return self.chosen.warning
        return (
            None
            if init_from is None
            else load_initial(init_from, self.stage.module, self.stage.recipe)
        )

    def restore(self, path: Path, *, allow_changes: bool) -> None:
        """Load a checkpoint.

        Raises:
            ValueError: the checkpoint does not fit the stage, or is of a step after the last.
        """
        state = restore(
            path,
            self.stage,
            self.accelerator,
            self.optimizer,
            self.average,
            allow_changes=allow_changes,
        )
        if state.cursor != state.step * self.settings.batch_size:  # the batch size has changed
            self.total = self.settings.steps_to_the_end(
                state.step, state.cursor, self.stage.order.samples_per_epoch
            )
        if state.step > self.total:
            raise ValueError(
                f"{path} is of step {state.step} and training ends at step {self.total}: increase "
                "training.steps or training.epochs, or resume from an earlier checkpoint."
            )
        self.step = self.saved_step = self.begun_step = state.step
        self.cursor, self.skipped = state.cursor, state.skipped_steps
        self.identity = state.run or self.identity
        best = state.best if self.settings.keep_best else None
        # Of another folder's checkpoint, the best has stayed behind there.
        if (
            best is not None
            and (checkpoint_path(self.run.checkpoints, best.step) / COMPLETE).is_file()
        ):
            self.best = best
        self.losses = [torch.tensor(loss, device=self.accelerator.device) for loss in state.losses]

    def begin_run(self) -> None:
        """Bring the run folder to the current step: recipe, metrics, checkpoints, best.json.

        Checkpoints that cannot be used are renamed, not removed.
        """
        if self.accelerator.is_main_process:
            for path in self.chosen.rejected:
                set_aside(path)
            self.run.begin(self.stage.recipe, step=self.step)
            self.run.set_identity(self.identity)
            write_best(self.run.path, self.best)
        self.accelerator.wait_for_everyone()

    def must_stop(self) -> bool:
        """Agree with the other ranks on stop requests, compiling, the end of an epoch of a stream,
        and the checkpoint in progress."""
        short = self._stream_is_short()
        flags = [self.stop.wanted, self.compiled.failed, short, *self.saver.flags()]
        wanted, eager, short, *saving = self.stop.agree(flags)
        self._note_outcome(self.saver.update(*saving))
        if short and self._stream is not None:
            self._stream.begin_again()
        if eager:
            self.monitor.print(self.compiled.run_eagerly(lambda reason: gather_object([reason])))
        return bool(wanted)

    def _stream_is_short(self) -> int:
        """Return 1 if this rank's part of a stream has no samples left for the next step."""
        if self._stream is None or self.stop.wanted:
            return 0
        self.watchdog.at(self.step + 1, WAITING_FOR_DATA)
        began = time.perf_counter()
        short = self._stream.is_short()
        self.monitor.clock.add(0, time.perf_counter() - began)
        return int(short)

    def learning_rate(self, factor: float) -> float:
        """Return the learning rate of the next step; the factor scales only the schedule's peak."""
        return learning_rate(
            self.settings.schedule,
            self.step,
            peak=self.settings.optimizer.lr * factor,
            total_steps=self.total,
            steps_per_epoch=self.stage.order.samples_per_epoch / self.settings.batch_size,
        )

    def next_batch(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return the micro-batches of the next step."""
        self.watchdog.at(self.step + 1, WAITING_FOR_DATA)
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.settings.accumulation)]
        self.monitor.clock.add(self.settings.batch_size, time.perf_counter() - began)
        self.watchdog.at(self.step + 1, "computing")
        self.compiled.begin_step()
        return micro_batches

    def record(self, loss: Tensor, norm: Tensor, micro_batches: list[Batch]) -> None:
        """Record a step: position and loss, and metrics if they are due.

        Whether it was skipped is not known here yet; see `settle`.

        Args:
            loss: loss of the step, NaN if it was skipped.
            norm: norm of the whole gradient.
            micro_batches: micro-batches of the step.
        """
        self.losses.append(loss)
        self.lr = self.learning_rate(1.0)
        self.step += 1
        self.cursor += self.settings.batch_size
        self._taken = TakenStep(self.step, HostCopy(norm), micro_batches)
        self.watchdog.at(self.step, "checking and logging the step")
        if (compiled := self.compiled.end_step()) is not None:
            self.monitor.print(compiled)
        self.monitor.advance()
        if self.step % self.settings.log_every == 0 or self.step == self.total:
            self._log()

    def settle(self) -> None:
        """Account for the last step, once: running average, number of skipped steps, anomalies.

        This waits until the device has taken it, so it happens while the gradient of the next one
        is computed, before the weights change again; or earlier, where the result is needed.

        Raises:
            DivergedError: see `Anomalies.check`.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return
        self.norm = float(taken.norm)
        if not math.isfinite(self.norm):
            self.skipped += 1
        elif self.average is not None:
            assert self.settings.ema_decay is not None
            self.average.update(self.settings.ema_decay, taken.step)
        self.anomalies.check(
            taken.step, self.norm, self.module, taken.micro_batches, self.monitor.print
        )

    def _log(self) -> None:
        self.settle()
        loss = float(self._losses_since_log().nanmean())
        self.losses.clear()
        position = TrainingPosition(
            step=self.step,
            epoch=self.cursor / self.stage.order.samples_per_epoch,
            samples=self.cursor,
        )
        counts = {"skipped": self.skipped}
        self.monitor.log_training(position, loss=loss, lr=self.lr, norm=self.norm, counts=counts)

    def _losses_since_log(self) -> Tensor:
        """Return the mean over ranks of each loss since the last log; NaN for a skipped step."""
        if not self.losses:
            return torch.zeros(0)
        losses: Tensor = self.accelerator.reduce(torch.stack(self.losses), "mean").cpu()
        return losses

    def evaluate_and_save(self) -> None:
        """Run the observers and save, whichever is due after the current step."""
        figures = self.monitor.observe(self.step, self.averaged())
        if self._is_best(figures) or self.step % self.settings.checkpoint_every == 0:
            self.watchdog.at(self.step, "copying a checkpoint, or waiting for the previous one")
            self.save()
        self.watchdog.at(self.step, "agreeing with all ranks whether to continue")

    def _is_best(self, figures: Mapping[str, float]) -> bool:
        """Return whether figures are the best so far, and remember them."""
        metric = self.monitor.watch.best_metric if self.settings.keep_best else None
        if metric is None or self.anomalies.in_a_row or not is_better(self.best, figures, metric):
            return False
        self.best = Best(step=self.step, metric=metric, value=figures[metric])
        return True

    @property
    def checkpoint_at_stop(self) -> str:
        """Whether a stop would save the current step, as a message."""
        if self.anomalies.in_a_row:
            return "which was skipped and is not saved: the previous checkpoint stays the last"
        return "writing a checkpoint"

    def save(self) -> None:
        """Start writing a checkpoint of the current step, unless it has one.

        None is written during a series of skipped steps, so that a restart begins before it.
        """
        self.settle()
        if self.begun_step == self.step or (self.anomalies.in_a_row and self.step < self.total):
            return
        losses = tuple(self._losses_since_log().tolist())
        self._note_outcome(self.saver.finish(self.stop.agree))
        state = TrainingState(
            step=self.step,
            cursor=self.cursor,
            total_steps=self.total,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            losses=losses,
            data_digest=self.stage.training_shards.digest,
            recipe_hash=recipe_hash(self.stage.recipe),
            processes=self.accelerator.num_processes,
            skipped_steps=self.skipped,
            best=self.best,
            run=self.identity,
        )
        contents = rank_contents(
            self.stage.module,
            self.optimizer,
            self.accelerator,
            state,
            to_yaml(self.stage.recipe),
            notes=self.stage.checkpoint_notes,
            average=self.average,
        )
        self.saver.start(self.step, contents, self.best)
        self.begun_step = self.step
        self.monitor.clock.restart()

    def save_final(self, *, required: bool) -> None:
        """Write a checkpoint of the current step and wait until it is complete.

        Raises:
            OSError: it cannot be written though it is required.
        """
        self.watchdog.at(self.step, "writing the last checkpoint")
        self.save()
        outcome = self.saver.finish(self.stop.agree)
        self._note_outcome(outcome)
        if required and outcome is not None and not outcome.saved:
            raise OSError(f"step {outcome.step} has no checkpoint: {outcome.reason}")

    def _note_outcome(self, outcome: SavingOutcome | None) -> None:
        """Record how the writing of a checkpoint ended, and warn of failures."""
        if outcome is None:
            return
        if outcome.saved:
            self.saved_step = outcome.step
            text = f"checkpoint {outcome.step} is complete, but {outcome.reason}"
        else:
            self.begun_step = self.saved_step
            if self.best is not None and self.best.step == outcome.step:
                self.best = None  # the next validation will be the best with a checkpoint
            text = (
                f"the checkpoint of step {outcome.step} was not written: {outcome.reason}. Until "
                "another one is written, a restart resumes from the previous one"
            )
        if outcome.reason:
            self.monitor.print(f"WARNING: {text}.")
