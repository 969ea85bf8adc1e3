"""Checks of hyperparameters: learning rate, masks, schedule, precision."""

from collections.abc import Iterator

import torch

from data_prep.format.text import count_noun
from simmim.doctor.checks import Check
from simmim.engine.monitor.hardware import measured_peak
from simmim.engine.monitor.tracking import chosen_trackers
from simmim.engine.settings import TrainingSettings
from simmim.method.masking import describe_distance
from simmim.method.strategies import MaskSettings
from simmim.tasks.all_tasks import task_named
from simmim.tasks.recipe import TaskRecipe
from simmim.tasks.task import REFERENCE_BATCH

FASTER = 1.5
"""Speed-up of matrix products in bf16 on a CPU from which bf16 is advised."""
FARTHEST = 4
"""Factor above or below the papers' learning rates from which there is a warning."""


def check_hyperparameters(
    recipe: TaskRecipe, samples_per_epoch: int, device: torch.device, *, published: bool = True
) -> Iterator[Check]:
    """Check learning rate, schedule, precision and trackers.

    Args:
        recipe: the recipe of the training.
        samples_per_epoch: samples of an epoch.
        device: device of the training.
        published: whether the encoder is that of the papers, whose learning rates are compared.
    """
    training = recipe.training
    if published:
        yield check_learning_rate(recipe)
    if recipe.mask is not None:
        yield check_masks(recipe.mask, recipe.data.image_size)
    yield from check_schedule(training, samples_per_epoch)
    yield check_precision(training.precision, device)
    names = chosen_trackers(training.trackers)
    yield Check(
        name="trackers", verdict="ok", found=", ".join(("metrics.jsonl", "report.html", *names))
    )


def check_learning_rate(recipe: TaskRecipe) -> Check:
    """Compare the learning rate with those of the papers, scaled linearly to the batch size."""
    lr, batch = recipe.training.optimizer.lr, recipe.training.batch_size
    scale = batch / REFERENCE_BATCH
    encoder = recipe.encoder
    task = task_named(recipe.task, "the recipe")
    scratch = task.fine_tunes and recipe.init_directory is None
    found = f"{lr:g} for {batch:,} {recipe.SAMPLES} per step"
    if not task.rates:
        found = f"{found}; the papers have no learning rate for the task {task.name}"
        return Check(name="learning rate", verdict="ok", found=found)
    fitting = [rate for rate in task.rates if encoder.variant in rate.variants]
    known = bool(fitting) and not encoder.is_custom and not scratch
    rates = [rate.lr * scale for rate in (fitting if known else task.rates)]
    low, high = min(rates), max(rates)
    span = f"{low:.1e}" if low == high else f"{low:.1e} to {high:.1e}"
    if not known:
        kind = "training from scratch" if scratch else "an encoder of this size"
        return Check(
            name="learning rate",
            verdict="ok",
            found=f"{found}; the papers have no learning rate for {kind}. Scaled linearly to this "
            f"batch, their others are {span}; small encoders take higher ones.",
        )
    listed = "; ".join(rate.text for rate in fitting)
    found = f"{found}; the papers' for {encoder.variant} ({listed}), scaled linearly: {span}"
    if low / FARTHEST <= lr <= high * FARTHEST:
        return Check(name="learning rate", verdict="ok", found=found)
    return Check(
        name="learning rate",
        verdict="warning",
        found=found,
        change=f"set training.optimizer.lr near {high:.1e}, unless the difference is intended: it "
        "is the learning rate of the global batch, never scaled by the number of processes",
    )


def check_masks(mask: MaskSettings, image_size: int) -> Check:
    """Report the AvgDist of the masks (SimMIM, section 4.1.2)."""
    return Check(name="masks", verdict="ok", found=describe_distance(mask, image_size))


def check_schedule(training: TrainingSettings, samples_per_epoch: int) -> Iterator[Check]:
    """Check the length of training and of the warm-up."""
    total = training.total_steps(samples_per_epoch)
    per_epoch = samples_per_epoch / training.batch_size
    schedule = training.schedule
    warmup = schedule.warmup_steps or round(schedule.warmup_epochs * per_epoch)
    found = (
        f"{count_noun(total, 'step')}, {total / per_epoch:.2f} epochs; "
        f"{count_noun(warmup, 'step')} of warm-up"
    )
    if warmup >= total:
        yield Check(
            name="schedule",
            verdict="warning",
            found=f"{found}: the learning rate never reaches training.optimizer.lr",
            change="train longer, or shorten training.schedule.warmup_steps or warmup_epochs",
        )
    elif not warmup and schedule.warmup_epochs:
        yield Check(
            name="schedule",
            verdict="warning",
            found=f"{found}: the {schedule.warmup_epochs:g} epochs of "
            f"training.schedule.warmup_epochs round to no step, as an epoch is {per_epoch:.2g} "
            "steps",
            change="lower training.batch_size, or set training.schedule.warmup_steps",
        )
    elif not warmup:
        yield Check(
            name="schedule",
            verdict="warning",
            found=found,
            change="set training.schedule.warmup_epochs: without warm-up AdamW's first steps are "
            "unstable",
        )
    else:
        yield Check(name="schedule", verdict="ok", found=found)
    if training.clip_norm is None:
        yield Check(
            name="clipping",
            verdict="warning",
            found="gradients are not clipped",
            change="set training.clip_norm to 5.0, as the papers' recipes do",
        )
    if per_epoch < 1:
        yield Check(
            name="batch",
            verdict="warning",
            found=f"a batch of {training.batch_size:,} is larger than an epoch of "
            f"{count_noun(samples_per_epoch, 'sample')}, so it repeats samples",
            change="lower training.batch_size, or add shards",
        )


def check_precision(precision: str, device: torch.device) -> Check:
    """Check whether the device computes fast in the recipe's precision."""
    change = ""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not native:
            change = "set training.precision to fp32: this GPU only emulates bfloat16"
        if precision == "fp32" and native:
            change = "set training.precision to bf16: several times faster here, with less memory"
        found = f"{precision} on {torch.cuda.get_device_name(device)}"
        return Check(
            name="precision", verdict="warning" if change else "ok", found=found, change=change
        )
    if device.type != "cpu":
        return Check(name="precision", verdict="ok", found=f"{precision} on {device.type}")
    full, half = (measured_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    ratio = max(half / full, full / half)  # a hundred or more on some processors
    times = f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.2g} times"
    compared = f"take {times} as long" if half <= full else f"are {times} as fast"
    found = f"{precision} on the CPU; matrix products in bf16 {compared}"
    if precision == "bf16" and half < full:
        change = "set training.precision to fp32, which is faster here"
        return Check(name="precision", verdict="warning", found=found, change=change)
    if precision == "fp32" and half > FASTER * full:
        change = "try training.precision bf16, which may be faster here"
    return Check(name="precision", verdict="ok", found=found, change=change)
