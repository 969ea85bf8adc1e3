"""What the measured speeds mean: who waits for whom, how long training takes, what is lost."""

import math
import os
from collections.abc import Iterator

import torch

from simmim.data.settings import DataSettings
from simmim.doctor.checks import Check
from simmim.doctor.dry_run import Speed
from simmim.engine.distributed.environment import available_cores
from simmim.engine.monitor.hardware import device_peak, utilisation
from simmim.engine.monitor.progress import duration
from simmim.tasks.all_tasks import TaskStage
from simmim.tasks.recipe import TaskRecipe

ENOUGH = 1.2
"""Times as fast as the device that data should come."""
LONGEST, SHORTEST = 3600.0, 60.0
"""Seconds between checkpoints beyond which one is remarked on."""
ASIDE = 0.1
"""Share of the time that validation and probes may take."""


def check_pace(
    stage: TaskStage, recipe: TaskRecipe, speed: Speed, device: torch.device, world: int
) -> Iterator[Check]:
    """Judge the speeds."""
    of = recipe.SAMPLES
    yield check_data_speed(recipe, speed, world)
    peak = device_peak(device, recipe.training.precision)
    share = utilisation(stage.flops_per_sample, speed.compute, peak, devices=world)
    source = "the maker's figure" if peak.source == "maker" else "a measured matrix product"
    yield Check(
        name="compute",
        verdict="ok",
        found=f"{speed.compute:,.1f} {of}/s, {share:.0%} of {peak.flops * world / 1e12:,.2f} "
        f"TFLOP/s ({source})",
    )
    rate = min(speed.data, speed.compute)
    yield from check_duration(stage, recipe, rate)


def check_data_speed(recipe: TaskRecipe, speed: Speed, world: int) -> Check:
    """Tell whether the device would wait for data, and how many workers would do."""
    workers = recipe.data.workers
    found = (
        f"{speed.data:,.1f} {recipe.SAMPLES}/s come from {workers} workers on each of {world} "
        f"processes, {speed.compute:,.1f} are computed; the first batch after "
        f"{speed.first_batch:.1f} s"
    )
    if speed.data >= ENOUGH * speed.compute:
        return Check(name="data speed", verdict="ok", found=found)
    wanted = math.ceil(max(workers, 1) * ENOUGH * speed.compute / speed.data)
    cores = available_cores()
    possible = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    smaller = "Smaller files are read faster"
    if isinstance(recipe.data, DataSettings):
        smaller = "Smaller images are read faster: `data-prep shard --short-side`"
    change = f"set data.workers to {min(wanted, possible)}"
    if wanted > possible:
        change = f"{change}, as many as there are cores for; {wanted} would be needed. {smaller}"
        if workers >= possible:
            change = (
                f"{wanted} workers a process would be needed, and there are cores for {possible}. "
                f"{smaller}"
            )
    return Check(name="data speed", verdict="warning", found=found, change=change)


def check_duration(stage: TaskStage, recipe: TaskRecipe, rate: float) -> Iterator[Check]:
    """Tell how long training takes, and how often it saves and looks."""
    training = recipe.training
    total = training.total_steps(stage.samples_per_epoch)
    step = training.batch_size / rate
    yield Check(
        name="duration",
        verdict="ok",
        found=f"{duration(total * step)} for {total:,} steps of {step:.2f} s",
    )
    between = training.checkpoint_every * step
    found = f"every {training.checkpoint_every:,} steps, {duration(between)}"
    advised = max(1, round(LONGEST / 4 / step))
    if between > LONGEST:
        yield Check(
            name="checkpoints",
            verdict="warning",
            found=f"{found}: so much is lost when a machine fails",
            change=f"set training.checkpoint_every to {advised:,}, a quarter of an hour",
        )
    elif between < SHORTEST and total * step > LONGEST:
        yield Check(
            name="checkpoints",
            verdict="warning",
            found=f"{found}: each interrupts training for a moment",
            change=f"set training.checkpoint_every to {advised:,}, a quarter of an hour",
        )
    else:
        yield Check(name="checkpoints", verdict="ok", found=found)
    yield from _check_looks(stage, recipe)


def _check_looks(stage: TaskStage, recipe: TaskRecipe) -> Iterator[Check]:
    """Tell what part of the images that are computed is for validation and probes.

    A forward pass is a third of a step.
    """
    training = recipe.training
    held_out = stage.validation_shards.samples if stage.validation_shards else 0
    per_step = held_out / training.validate_every
    share = (per_step + recipe.probed_per_step) / 3 / training.batch_size
    found = f"validation and probes add about {share:.1%} to the time"
    if share > ASIDE:
        yield Check(
            name="looking",
            verdict="warning",
            found=found,
            change="raise training.validate_every or probe.every, or hold out less",
        )
    else:
        yield Check(name="looking", verdict="ok", found=found)
