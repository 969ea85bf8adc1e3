"""A dry run on every rank: reading data, then steps with a learning rate of 0; and its speed."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from data_prep.format.text import count_noun, format_bytes
from simmim.data.loader.batch import Batch
from simmim.doctor.checks import Check, problem
from simmim.engine.devices import prepare
from simmim.engine.distributed.sharding import trains_in_shards
from simmim.engine.loop import training_step
from simmim.engine.monitor.hardware import (
    device_peak,
    host_peak,
    memory_in_use,
    utilisation,
)
from simmim.engine.monitor.observers import PROBE
from simmim.engine.monitor.progress import duration
from simmim.engine.optimizer import set_learning_rate
from simmim.engine.stage import TrainingStage
from simmim.environment import available_cores, process_environment
from simmim.tasks.recipe import TaskRecipe

Answer = TypeVar("Answer")

MOST_BATCHES = 1000
"""Maximum number of global batches that are read."""
MOST_STEPS = 10
REMEDIES = {
    "data": "repair or leave out what is named above, or lower data.workers if memory ran out",
    "dry step": "if memory ran out, raise training.accumulation or set execution.checkpointing",
}
NO_RATE = 0.0
"""Learning rate of dry steps: gradients are computed and clipped, weights do not change."""


USUAL_SHARE = 0.3
"""Share of the peak that training reaches, for an estimate."""
WHOLE_STEPS = 3
"""Steps that a dry run takes at least."""
LONGEST_ANSWER = 30.0
"""Seconds that dry steps may take without a message before them."""
DATA_MARGIN = 1.2
"""How many times faster than computing data loading should be."""
LONGEST, SHORTEST = 3600.0, 60.0
"""Seconds between checkpoints outside of which there is a warning."""
VALIDATION_SHARE = 0.1
"""Fraction of the time that validation and probes may take without a warning."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured speeds over all ranks."""

    first_batch: float
    """Seconds until the first batch, on the slowest rank."""
    data: float
    """Samples per second from the loaders, with nothing computed."""
    compute: float
    """Samples per second of training steps on data in memory."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Result of a dry run."""

    checks: list[Check]
    speed: Speed | None
    """None if something failed."""


class DryRunError(Exception):
    """Some rank failed; the argument is the check that reports it."""


def dry_run(stage: TrainingStage, accelerator: Accelerator, seconds: float) -> DryRun:
    """Read data and take steps for a while; all ranks call it together.

    Args:
        stage: the training to try.
        accelerator: devices and processes.
        seconds: time to read for, and again to compute for.
    """
    try:
        wait, rate, batches = _on_all_ranks(
            "data", accelerator, lambda: _read(stage, accelerator, seconds)
        )
        waits, rates = gather_value(accelerator, wait), gather_value(accelerator, rate)
        if not trains_in_shards(accelerator):  # the model need not fit one device
            # Alone first: where one rank fails in a common step, the others would wait for it.
            _on_all_ranks("dry step", accelerator, lambda: _step_alone(stage, accelerator, batches))
        compute, loss, norm = _on_all_ranks(
            "dry step", accelerator, lambda: _steps(stage, accelerator, batches, seconds)
        )
    except DryRunError as failed:
        return DryRun(checks=list(failed.args), speed=None)
    speed = Speed(
        first_batch=max(waits), data=sum(rates), compute=min(gather_value(accelerator, compute))
    )
    return DryRun(checks=list(_step_checks(accelerator, loss, norm)), speed=speed)


def _step_checks(accelerator: Accelerator, loss: float, norm: float) -> Iterator[Check]:
    values = [*gather_value(accelerator, loss), *gather_value(accelerator, norm)]
    finite = all(math.isfinite(value) for value in values)
    sharded = "with sharded weights " if trains_in_shards(accelerator) else ""
    found = (
        f"forward and backward {sharded}on "
        f"{count_noun(accelerator.num_processes, 'process', 'processes')} "
        f"({accelerator.device.type}): "
        f"loss {loss:.4f}, gradient norm {norm:.4g}"
    )
    on_device = accelerator.device.type == "cuda"
    peak = memory_in_use(accelerator.device).device_peak if on_device else host_peak()
    place = "device memory" if on_device else "host memory per process"
    found += f", peak {place} {format_bytes(max(gather_value(accelerator, peak)))}"
    if finite:
        yield Check(name="dry step", verdict="ok", found=found)
    else:
        yield Check(
            name="dry step",
            verdict="problem",
            found=f"{found}: not finite",
            change="look for blank images, or a data.std near 0",
        )


def _on_all_ranks(name: str, accelerator: Accelerator, act: Callable[[], Answer]) -> Answer:
    """Return the result of `act` once it has succeeded on all ranks.

    Raises:
        DryRunError: it failed on some rank; raised on all, so that none continues alone.
    """
    try:
        answer = act()
        failed = None
    except Exception as error:  # all ranks have to know, whatever it is
        failed = problem(name, error)
    ranks = [
        rank for rank, bad in enumerate(gather_value(accelerator, float(failed is not None))) if bad
    ]
    if not ranks:
        return answer
    where = f"failed on rank {', '.join(map(str, ranks))} of {accelerator.num_processes}"
    said = f"{where}: {failed.found}" if failed else f"{where}; see that rank's own output"
    if failed and ranks[0] == accelerator.process_index and not accelerator.is_main_process:
        sys.stderr.write(f"rank {accelerator.process_index}: {failed.found}\n")
    raise DryRunError(
        Check(name=name, verdict="problem", found=said, change=REMEDIES.get(name, ""))
    )


def gather_value(accelerator: Accelerator, value: float) -> list[float]:
    """Return the value of each rank."""
    mine = torch.tensor([value], dtype=torch.float32, device=accelerator.device)
    values: list[float] = accelerator.gather(mine).tolist()
    return values


def _read(
    stage: TrainingStage, accelerator: Accelerator, seconds: float
) -> tuple[float, float, list[Batch]]:
    """Return seconds to the first batch, this rank's samples per second, and micro-batches."""
    training = stage.recipe.training
    began = time.perf_counter()
    batches = stage.batches(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start=0,
        end=MOST_BATCHES * training.batch_size,
    )
    kept: list[Batch] = []
    images, first = 0, began
    for batch in batches:
        if not kept:
            first = time.perf_counter()
        else:
            images += len(batch)
        if len(kept) < training.accumulation:
            kept.append(batch)
        elif time.perf_counter() - first > seconds:
            break
    return first - began, images / max(time.perf_counter() - first, 1e-9), kept


def _step_alone(stage: TrainingStage, accelerator: Accelerator, batches: list[Batch]) -> None:
    """Compute a loss on this rank's own module."""
    module = stage.module.to(accelerator.device)
    with accelerator.autocast():
        loss = module.train()(batches[0].to(accelerator.device))
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss of the first batch is {float(loss)}")


def _steps(
    stage: TrainingStage, accelerator: Accelerator, batches: list[Batch], seconds: float
) -> tuple[float, float, float]:
    """Return samples per second over all ranks, and loss and gradient norm of the last step."""
    training = stage.recipe.training
    module, optimizer = prepare(stage, accelerator)
    set_learning_rate(optimizer, lambda _: NO_RATE)
    module.train()

    def step() -> tuple[float, float]:
        loss, norm = training_step(
            accelerator,
            module,
            optimizer,
            batches,
            clip_norm=training.clip_norm,
            normalisers=stage.normalisers,
        )
        return float(accelerator.reduce(loss, "mean")), float(norm)

    step()  # the first is slow: kernels are chosen, memory is allocated
    taken, began = 0, time.perf_counter()
    loss = norm = 0.0
    enough = False
    while taken < MOST_STEPS and not enough:
        loss, norm = step()
        taken += 1
        # The slowest rank decides, so that all take the same number.
        enough = max(gather_value(accelerator, time.perf_counter() - began)) > seconds
    return taken * training.batch_size / (time.perf_counter() - began), loss, norm


def warn_of_long_steps(*, flops: float, batch_size: int, peak: float, seconds: float) -> str | None:
    """Return a message if the dry steps take longer than `seconds`, as every one is whole.

    Args:
        flops: FLOPs of a forward pass over a sample.
        batch_size: samples of a step.
        peak: FLOP/s of all devices.
        seconds: the time to compute for.
    """
    step = 3 * flops * batch_size / (USUAL_SHARE * peak)
    if WHOLE_STEPS * step < max(seconds, LONGEST_ANSWER):
        return None
    return (
        f"the dry steps take longer: a step of {batch_size:,} samples takes about "
        f"{duration(step)} here, and {WHOLE_STEPS} are taken. For a quicker answer add "
        "--training.batch_size with a smaller one"
    )


def check_pace(
    stage: Any, recipe: TaskRecipe, speed: Speed, device: torch.device, world: int
) -> Iterator[Check]:
    """Check data loading, compute, duration, checkpoints and validation."""
    of = recipe.SAMPLES
    yield check_data_speed(recipe, speed, world)
    peak = device_peak(device, recipe.training.precision)
    share = utilisation(stage.watch.flops_per_sample, speed.compute, peak, devices=world)
    source = "vendor figure" if peak.source == "maker" else "measured matrix product"
    yield Check(
        name="compute",
        verdict="ok",
        found=f"{speed.compute:,.1f} {of}/s, {share:.0%} of {peak.flops * world / 1e12:,.2f} "
        f"TFLOP/s ({source})",
    )
    rate = min(speed.data, speed.compute)
    yield from check_duration(stage, recipe, rate)


def check_data_speed(recipe: TaskRecipe, speed: Speed, world: int) -> Check:
    """Check whether computing would wait for data, and how many workers would be enough."""
    workers = recipe.data.workers
    found = (
        f"data loading {speed.data:,.0f} {recipe.SAMPLES}/s ({world} x "
        f"{count_noun(workers, 'worker')}), compute "
        f"{speed.compute:,.0f} {recipe.SAMPLES}/s; first batch after {speed.first_batch:.1f} s"
    )
    if speed.data >= DATA_MARGIN * speed.compute:
        return Check(name="data speed", verdict="ok", found=found)
    wanted = math.ceil(max(workers, 1) * DATA_MARGIN * speed.compute / speed.data)
    cores = available_cores()
    possible = max(1, cores // process_environment().local_world)
    smaller = recipe.data.SMALLER
    change = f"set data.workers to {min(wanted, possible)}"
    if wanted > possible:
        change = f"{change}, one per core; {wanted} would be needed. {smaller}"
        if workers >= possible:
            change = (
                f"{count_noun(wanted, 'worker')} per process would be needed, but there are only "
                f"{count_noun(possible, 'core')} per process. {smaller}"
            )
    return Check(name="data speed", verdict="warning", found=found, change=change)


def check_duration(stage: Any, recipe: TaskRecipe, rate: float) -> Iterator[Check]:
    """Check how long training takes, and how often it saves, validates and probes."""
    training = recipe.training
    total = training.total_steps(stage.order.samples_per_epoch)
    step = training.batch_size / rate
    yield Check(
        name="duration",
        verdict="ok",
        found=f"{duration(total * step)} for {count_noun(total, 'step')} of {step:.2f} s",
    )
    between = training.checkpoint_every * step
    found = f"every {count_noun(training.checkpoint_every, 'step')}, {duration(between)}"
    advised = max(1, round(LONGEST / 4 / step))
    if between > LONGEST:
        yield Check(
            name="checkpoints",
            verdict="warning",
            found=f"{found}: a failure loses that much work",
            change=f"set training.checkpoint_every to {advised:,}, about 15 minutes",
        )
    elif between < SHORTEST and total * step > LONGEST:
        yield Check(
            name="checkpoints",
            verdict="warning",
            found=f"{found}: each pauses training briefly",
            change=f"set training.checkpoint_every to {advised:,}, about 15 minutes",
        )
    else:
        yield Check(name="checkpoints", verdict="ok", found=found)
    yield check_validation_time(stage, recipe, rate)


def check_validation_time(stage: Any, recipe: TaskRecipe, rate: float) -> Check:
    """Check the time that validation and probes take: a forward pass is 1/3 of a step.

    Args:
        stage: the training.
        recipe: its recipe, as resolved.
        rate: samples that training takes per second.
    """
    training = recipe.training
    total = training.total_steps(stage.order.samples_per_epoch)
    held_out = stage.validation_shards.samples if stage.validation_shards else 0
    # As `Observer.is_due` says, whatever the interval, after the last step too.
    validations = math.ceil(total / training.validate_every)
    probe = stage.watch.observer(PROBE)
    probes = 0 if probe is None else math.ceil(total / probe.every)
    probed = 0.0 if probe is None else recipe.probed_per_step * probe.every
    forward = (held_out * validations + probed * probes) / 3
    share = forward / (total * training.batch_size)
    times = count_noun(validations, "validation") if held_out else "no validation"
    if probes:
        times += f" and {count_noun(probes, 'probe')}"
    found = (
        f"{times}: about {duration(forward / rate)}, {share:.1%} of the training time; pictures "
        "are not counted"
    )
    if share > VALIDATION_SHARE:
        return Check(
            name="evaluation",
            verdict="warning",
            found=found,
            change="raise training.validate_every or probe.every, or hold out fewer samples",
        )
    return Check(name="evaluation", verdict="ok", found=found)
