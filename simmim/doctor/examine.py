"""Checks of a training setup beyond its recipe: data, memory, disk, and a dry run."""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from simmim.data.datasets.image_set import ImageSet
from simmim.data.datasets.mixture import MixedShards, StreamedShards
from simmim.doctor.checks import Check, attempt, print_checks
from simmim.doctor.dry_run import check_pace, dry_run, gather_value, warn_of_long_steps
from simmim.doctor.files import check_class_sizes, check_labelled_files
from simmim.doctor.fits import check_weights_fit
from simmim.doctor.hyperparameters import check_hyperparameters
from simmim.doctor.memory import check_disk, check_memory
from simmim.doctor.shards import check_order, check_shards, check_workers
from simmim.engine.checkpoint.choosing import choose_checkpoint
from simmim.engine.checkpoint.resume import resumable_state
from simmim.engine.devices import build_accelerator, own_process_state
from simmim.engine.distributed.launcher import end_processes, end_with_launcher, start_processes
from simmim.engine.monitor.hardware import device_peak
from simmim.engine.run import RunFolder
from simmim.environment import process_environment
from simmim.tasks.all_tasks import task_named
from simmim.tasks.architecture import overridden
from simmim.tasks.input_check import input_of
from simmim.tasks.loading import with_recorded_slots
from simmim.tasks.recipe import TaskRecipe
from swinv2.encoder import HierarchicalEncoder


@own_process_state()
def examine_training(
    recipe: TaskRecipe, folder: str, first: Check, *, resume: str | None, seconds: float
) -> int:
    """Check everything but the recipe, print all checks, and return the exit code.

    Args:
        recipe: the recipe of the training.
        folder: run folder.
        first: the check of the recipe.
        resume: value of `--resume`, as for training.
        seconds: duration of reading data, and of the dry steps.
    """
    checks = [first]
    stages: list[Any] = []
    run = RunFolder(path=Path(folder))
    found = attempt(
        "data and model", lambda: _open(with_recorded_slots(recipe, run, resume), stages)
    )
    if found:
        return print_checks(checks + found)
    start_processes()
    end_with_launcher()
    accelerator = build_accelerator(recipe.training.precision)
    line = overridden(recipe, stages[0].recipe)
    if line is not None:
        checks.append(Check(name="encoder", verdict="ok", found=line))
    checks += examine(stages[0], run, accelerator, resume=resume, seconds=seconds, given=recipe)
    code = max(gather_value(accelerator, print_checks(checks)))  # the same on every rank
    end_processes(accelerator)
    return int(code)


def _open(recipe: TaskRecipe, stages: list[Any]) -> Iterable[Check]:
    """Open everything that training opens before it starts; yield nothing on success."""
    process_environment().check_parallelism()
    check_weights_fit(recipe)
    stage: Any = task_named(recipe.task, "the recipe").stage(recipe)
    stage.batches(
        rank=0, world=process_environment().world, start=0, end=recipe.training.batch_size
    )
    stages.append(stage)
    return ()


def examine(
    stage: Any,
    run: RunFolder,
    accelerator: Accelerator,
    *,
    resume: str | None,
    seconds: float,
    given: TaskRecipe | None = None,
) -> list[Check]:
    """Check everything but the recipe; all ranks call it, and the main one has the results."""
    recipe, device, world = stage.recipe, accelerator.device, accelerator.num_processes
    checks: list[Check] = []

    def check(name: str, examine: Callable[[], Iterable[Check]]) -> None:
        if accelerator.is_main_process:
            _report(name)
            checks.extend(attempt(name, examine))

    check("run folder", lambda: [check_run(run, stage, resume, given)])
    check("plan", lambda: _check_plan(stage, device))
    check("shards" if _reads_images(stage) else "data", lambda: _check_data(stage, given or recipe))
    check("order", lambda: [check_order(stage.order, recipe.training.batch_size)])
    check("workers", lambda: [check_workers(recipe.data.workers)])
    check("memory", lambda: _check_memory(stage, device, world))
    check("disk", lambda: [_disk(stage, run)])
    too_large = any(one.name == "memory" and one.verdict == "problem" for one in checks)
    if device.type == "cpu" and max(gather_value(accelerator, float(too_large))):
        skipped = "left out: a step would take more memory than this machine has"
        checks.append(Check(name="dry step", verdict="warning", found=skipped))
        return checks
    if accelerator.is_main_process:
        longer = warn_of_long_steps(
            flops=stage.watch.flops_per_sample,
            batch_size=recipe.training.batch_size,
            peak=device_peak(device, recipe.training.precision).flops * world,
            seconds=seconds,
        )
        _report(longer or f"dry run, about {2 * seconds:.0f} s")
    accelerator.wait_for_everyone()
    dry = dry_run(stage, accelerator, seconds)
    checks += dry.checks
    speed = dry.speed
    if speed is not None:
        check("pace", lambda: check_pace(stage, recipe, speed, device, world))
    return checks


def _reads_images(stage: Any) -> bool:
    """Return whether training is on images alone, in shards or folders, perhaps with a class."""
    return isinstance(stage.training_shards, ImageSet | MixedShards | StreamedShards)


def _check_plan(stage: Any, device: torch.device) -> Iterable[Check]:
    published = isinstance(stage.encoder, HierarchicalEncoder)
    return check_hyperparameters(
        stage.recipe, stage.order.samples_per_epoch, device, published=published
    )


def _check_memory(stage: Any, device: torch.device, world: int) -> Iterable[Check]:
    """Estimate the memory of a step, whose sizes are in the recipe if the encoder is a SwinV2."""
    if isinstance(stage.encoder, HierarchicalEncoder):
        return check_memory(stage.recipe, device, world)
    found = (
        f"not estimated for a {type(stage.encoder).__name__}, only for a SwinV2; the dry step "
        "measures a training step"
    )
    return [Check(name="memory", verdict="ok", found=found)]


def _check_data(stage: Any, given: TaskRecipe) -> Iterable[Check]:
    """Check the training and validation data; `given` as in `input_of`."""
    if _reads_images(stage):
        training, validation = stage.training_shards, stage.validation_shards
        yield from check_shards(training, validation, stage.recipe.data, input_of(stage, given))
    else:
        yield from check_labelled_files(stage, given)
    counts = stage.class_counts()
    if counts is not None:
        yield check_class_sizes(counts, stage.recipe.SAMPLES)


def count_permanent_checkpoints(stage: Any) -> int:
    """Return how many checkpoints a complete training keeps in addition to the last ones."""
    training = stage.recipe.training
    if training.keep_every is None:
        return 0
    every = math.lcm(training.keep_every, training.checkpoint_every)
    steps: int = training.total_steps(stage.order.samples_per_epoch)
    return steps // every


def _disk(stage: Any, run: RunFolder) -> Check:
    training = stage.recipe.training
    best = training.keep_best and stage.watch.best_metric is not None
    return check_disk(
        run.path,
        stage.module,
        kept=training.keep_last + int(best) + count_permanent_checkpoints(stage),
        average=training.ema_decay is not None,
    )


def check_run(
    run: RunFolder, stage: Any, resume: str | None, given: TaskRecipe | None = None
) -> Check:
    """Check that training may write into its folder, and resume from the checkpoint in it."""
    chosen = choose_checkpoint(run.checkpoints, resume, run=run.identity())
    checkpoint = chosen.path
    run.check(stage.recipe, resume=resume is not None, checkpoint=checkpoint, given=given)
    if checkpoint is None:
        return Check(name="run folder", verdict="ok", found=f"training starts in {run.path}")
    step = resumable_state(checkpoint, stage, allow_changes=False).step
    found = f"training resumes in {run.path} from {checkpoint}, after step {step:,}"
    if chosen.rejected:
        return Check(
            name="run folder",
            verdict="warning",
            found=f"{found}; rejected: {'; '.join(chosen.rejected.values())}",
            change="copy them again from where they were saved, or train those steps again",
        )
    return Check(name="run folder", verdict="ok", found=found)


def _report(text: str) -> None:
    sys.stderr.write(f"checking: {text}\n")
    sys.stderr.flush()
