"""The training loop, which every stage runs on. It is the one place that calls backward."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.engine.checkpoint.directory import checkpoint_path, kept_best, load_state
from simmim.engine.checkpoint.resume import stage_to_export
from simmim.engine.checkpoint.sharded_state import full_tensor
from simmim.engine.devices import prepare
from simmim.engine.distributed.sharding import no_gradient_sync
from simmim.engine.distributed.signals import StopRequest
from simmim.engine.distributed.watchdog import group_timeout
from simmim.engine.monitor.anomalies import propagate_nonfinite
from simmim.engine.monitor.monitor import ReportWriter
from simmim.engine.monitor.observers import VALIDATION
from simmim.engine.optimizer import set_learning_rate, step_if_finite
from simmim.engine.run import RunFolder
from simmim.engine.stage import TrainingStage
from simmim.engine.trainer import Trainer
from simmim.stop_signals import ProcessExit


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended."""

    step: int
    """Step of the last complete checkpoint; 0 if there is none. Usually the last step taken, unless
    a stop's checkpoint could not be written or the last steps were skipped."""
    stopped: bool
    """Whether a signal ended training before its last step."""
    figures: dict[str, float]
    """Figures of the last validation."""


def train(
    stage: TrainingStage,
    run: RunFolder,
    accelerator: Accelerator,
    resume: str | None,
    *,
    allow_changes: bool = False,
    init_from: Path | None = None,
    write_report: ReportWriter | None = None,
    process_exit: ProcessExit = "no",
) -> TrainingResult:
    """Train a stage to its last step, or until a signal asks to stop.

    Args:
        stage: model, data and recipe.
        run: folder that everything is written to.
        accelerator: devices and processes.
        resume: None to start a new training, `auto`, or the path of a checkpoint.
        allow_changes: resume with another batch size than the checkpoint's.
        init_from: initial weights, unless a checkpoint is resumed; see `load_initial`.
        write_report: writes the report of the run; None writes none.
        process_exit: whether the process exits afterwards.

    Raises:
        DivergedError: loss or gradient were non-finite in too many steps in a row; the last
            checkpoint is from before them.
        RankLostError: another process failed or is gone.
        OSError: the checkpoint of the last step cannot be written. If that happens at a stop, only
            a warning is printed: the previous checkpoint can be resumed.
    """
    timeout = group_timeout(stage.recipe.training.rank_timeout)
    stop = StopRequest(timeout, process_exit=process_exit)
    module, optimizer = prepare(stage, accelerator)
    trainer = Trainer(
        stage, run, accelerator, module, optimizer, stop=stop, write_report=write_report
    )
    loaded = trainer.load_weights(resume, init_from, allow_changes=allow_changes)
    stream = trainer.batches()  # raises before anything is written if ranks cannot share the data
    trainer.begin_run()
    with (
        stop,
        trainer.watchdog,
        closing(trainer.saver),  # on a failure, a checkpoint in progress is still written
        trainer.monitor.monitoring(trainer.step, total=trainer.total) as monitor,
    ):
        for message in (loaded, trainer.layer_table()):
            if message is not None:
                monitor.print(message)
        batches = iter(stream)
        monitor.clock.restart()
        while trainer.step < trainer.total and not trainer.must_stop():
            advance(trainer, batches)
        finish(trainer, stop)
    return TrainingResult(
        step=max(0, trainer.saved_step),
        stopped=trainer.step < trainer.total,
        figures=trainer.monitor.figures.get(VALIDATION, {}),
    )


def advance(trainer: Trainer, batches: Iterator[Batch]) -> None:
    """Take one optimiser step; then log, observe and save, whichever is due."""
    set_learning_rate(trainer.optimizer, trainer.learning_rate)
    micro_batches = trainer.next_batch(batches)
    trainer.module.train()
    loss, norm = training_step(
        trainer.accelerator,
        trainer.module,
        trainer.optimizer,
        micro_batches,
        clip_norm=trainer.settings.clip_norm,
        normalisers=trainer.stage.normalisers,
        before_update=trainer.settle,
    )
    trainer.record(loss, norm, micro_batches)
    trainer.evaluate_and_save()


Normalisers = Callable[[Batch], Tensor | None]
"""What the terms of the loss are divided by; see `TrainingStage.normalisers`."""


def training_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    *,
    clip_norm: float | None,
    normalisers: Normalisers,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step over the micro-batches of one batch.

    If loss or gradient are non-finite on any rank, all ranks skip the step: weights and optimiser
    state do not change. With a fused optimiser the device decides, and nothing here waits for it.
    `before_update` is called before the weights change, while the device computes the gradient.

    Returns:
        This rank's loss, whose mean over ranks is that of the batch, NaN if the step was skipped;
        and the norm of the whole gradient before clipping; scalars on the device.
    """
    loss = accumulate_gradients(accelerator, module, batches, normalisers)
    norm = accelerator.clip_grad_norm_(module.parameters(), clip_norm or math.inf)
    assert norm is not None
    norm = full_tensor(torch.as_tensor(norm))
    before_update()
    if accelerator.scaler is not None:  # the fp16 scaler skips such steps itself
        optimizer.step()
    else:
        step_if_finite(optimizer, norm)
    optimizer.zero_grad(set_to_none=True)
    return torch.where(norm.isfinite(), loss, math.nan), norm


def accumulate_gradients(
    accelerator: Accelerator,
    module: nn.Module,
    batches: Sequence[Batch],
    normalisers: Normalisers,
) -> Tensor:
    """Add the gradient of the mean loss over micro-batches; return that loss, on the device."""
    loss_sum = torch.zeros((), device=accelerator.device)
    divisors = batch_normalisers(accelerator, batches, normalisers)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        # Ranks exchange gradients once per step, with the last micro-batch; shards with each.
        with nullcontext() if last else no_gradient_sync(module, accelerator):
            here = batch.to(accelerator.device)
            loss = module(here) / len(batches) if divisors is None else module(here, divisors)
            accelerator.backward(propagate_nonfinite(loss))
        loss_sum += loss.detach()
    return loss_sum


def batch_normalisers(
    accelerator: Accelerator, batches: Sequence[Batch], normalisers: Normalisers
) -> Tensor | None:
    """Return the normalisers of a whole optimiser batch, divided by the number of ranks.

    With these a rank's loss, summed over micro-batches, and its gradient are such that their means
    over ranks are those of the batch. None if the stage has none; see `TrainingStage.normalisers`.

    Args:
        accelerator: devices and processes.
        batches: this rank's micro-batches, on any device.
        normalisers: returns those of a micro-batch.
    """
    parts = [part for batch in batches if (part := normalisers(batch)) is not None]
    if not parts:
        return None
    own = torch.stack(parts).sum(0).to(accelerator.device, non_blocking=True)
    total = accelerator.reduce(own, "sum")
    processes: int = accelerator.num_processes
    return nonzero(total) / processes


def nonzero(normalisers: Tensor) -> Tensor:
    """Return normalisers with 1 in place of 0, where there is nothing to average."""
    return normalisers.masked_fill(normalisers == 0, 1.0)


def finish(trainer: Trainer, stop: StopRequest) -> None:
    """Write the last checkpoint and, unless training was stopped, export the encoder."""
    trainer.settle()
    stopped = trainer.step < trainer.total
    stop.honoured = stopped
    if stopped:
        received = stop.received.name if stop.received else "a signal on another rank"
        trainer.monitor.print(
            f"{received}: stopping after step {trainer.step}, {trainer.checkpoint_at_stop}."
        )
    trainer.save_final(required=not stopped)
    trainer.watchdog.at(trainer.step, "ending" if stopped else "exporting the encoder")
    if not stopped and trainer.accelerator.is_main_process:
        export(trainer)
    trainer.accelerator.wait_for_everyone()


def export(trainer: Trainer) -> None:
    """Write encoder and head into the run: of the best checkpoint if one is kept, else the last."""
    last = checkpoint_path(trainer.run.checkpoints, trainer.step)
    best = kept_best(trainer.run.path) if trainer.settings.keep_best else None
    if best is not None and best != last:
        try:
            state = load_state(best)
            stage = stage_to_export(trainer.stage, best, trained=False)
        except (ValueError, OSError) as error:
            trainer.monitor.print(f"WARNING: the last step is exported, not the best: {error}")
            stage = stage_to_export(trainer.stage, last, trained=False)
            stage.export_encoder(trainer.run, trainer.step, trainer.cursor)
        else:
            stage.export_encoder(trainer.run, state.step, state.cursor)
        return
    with trainer.averaged():
        stage = stage_to_export(trainer.stage, last, trained=True)
        stage.export_encoder(trainer.run, trainer.step, trainer.cursor)
