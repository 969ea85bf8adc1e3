"""Checks of the device memory and the disk space that training needs."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import nn

from data_prep.format.text import count_noun, format_bytes
from simmim.bench.choices import Sharding
from simmim.bench.memory import Placement, make_rows
from simmim.bench.step import StepCase
from simmim.doctor.checks import Check
from simmim.doctor.estimates import (
    advise_accumulation,
    frozen_memory,
    least_memory,
    most_activations,
    most_parameters,
)
from simmim.doctor.machine import machine_memory
from simmim.environment import process_environment
from simmim.method.settings import LossSettings
from simmim.method.strategies import MaskSettings
from simmim.tasks.recipe import OF_VARIANT, TaskRecipe

FULL = 0.9
"""Fraction of the device memory above which an estimate is too close to be sure."""


def check_memory(recipe: TaskRecipe, device: torch.device, world: int) -> Iterator[Check]:
    """Compare the estimated memory of a step with the device's; see `simmim bench memory`.

    Args:
        recipe: the recipe of the training.
        device: device of the training.
        world: number of processes.
    """
    if recipe.step_for_estimate is None:
        yield Check(
            name="memory",
            verdict="ok",
            found=f"not estimated for {recipe.task}, whose memory depends on head and samples; "
            "the dry step measures a training step, and validation may need more",
        )
        return
    training = recipe.training
    share = training.batch_size // world
    micro = max(1, share // training.accumulation)
    placement = placement_of(world)
    there = device_memory(device)
    config = recipe.encoder.config(recipe.data.image_size)
    least = least_memory(recipe, config, micro, placement)
    if least > there:  # simulating it may take minutes
        free = FULL * there - 4 * 4 * most_parameters(config) / placement.devices
        free -= frozen_memory(recipe, 0)
        yield Check(
            name="memory",
            verdict="problem",
            found=f"at least {format_bytes(least)} for micro-batches of "
            f"{count_noun(micro, 'image')} per process; {format_bytes(there)} available",
            change=advise_accumulation(max(1, share), free / most_activations(config)),
        )
        return
    case = step_case(recipe, micro, recipe.step_for_estimate)
    beside = round(frozen_memory(recipe, micro))
    needed = needed_memory(case, placement) + beside
    found = (
        f"{format_bytes(needed)} estimated for micro-batches of {count_noun(micro, 'image')} per "
        f"process, with {blocks_of(case)} blocks; {format_bytes(there)} available"
    )
    if needed <= FULL * there:
        yield Check(name="memory", verdict="ok", found=found)
        return
    yield Check(
        name="memory",
        verdict="problem" if needed > there else "warning",
        found=found,
        change=advise(case, placement, needed - beside, there - beside, share),
    )


def blocks_of(case: StepCase) -> str:
    """Return how the blocks of a step run."""
    return "compiled" if case.compiled else "eager"


def advise(case: StepCase, placement: Placement, needed: int, there: int, share: int) -> str:
    """Suggest how to make a step fit: accumulation, checkpointing, bf16 or sharding."""
    few = needed_memory(replace(case, batch=1), placement)
    slope = (needed - few) / max(case.batch - 1, 1)
    room = FULL * there
    fitting = int(1 + (room - few) / slope) if few <= room and slope > 0 else 0
    parts = next((n for n in range(1, share + 1) if share % n == 0 and share // n <= fitting), None)
    advice = []
    if parts is not None and case.batch > 1:
        advice.append(f"raise training.accumulation to {parts}")
    if case.checkpointing != "full":
        again = needed_memory(replace(case, checkpointing="full"), placement)
        advice.append(f"set execution.checkpointing to full (estimate {format_bytes(again)})")
    if case.precision == "fp32":
        advice.append("set training.precision to bf16")
    advice.append("shard over devices, see `simmim bench memory`")
    return "; or ".join(advice)


def step_case(
    recipe: TaskRecipe, batch: int, estimated: tuple[MaskSettings, LossSettings]
) -> StepCase:
    """Return the SimMIM step of this mask and loss whose memory is estimated for a recipe."""
    mask, loss = estimated
    encoder, size = recipe.encoder, recipe.data.image_size
    (window, _) = encoder.config(size).window_size
    chosen = [(name, getattr(encoder, name)) for name in OF_VARIANT]
    return StepCase(
        variant=encoder.variant,
        image_size=size,
        window_size=window,
        attention=recipe.execution.attention,
        checkpointing=recipe.execution.checkpointing,
        precision="fp32" if recipe.training.precision == "fp32" else "bf16",  # as large as fp16
        batch=batch,
        mask=mask,
        loss=loss,
        patch_size=encoder.patch_size,
        in_channels=encoder.in_channels,
        device="cuda" if torch.cuda.is_available() else "cpu",
        compiled=recipe.execution.compiles,
        sizes=tuple((name, value) for name, value in chosen if value is not None),
    )


def needed_memory(case: StepCase, placement: Placement) -> int:
    """Return the bytes that a step needs on each device; it is simulated."""
    whole = Placement(sharding="none", devices=1)
    (row,) = make_rows(
        [case],
        list(dict.fromkeys([whole, placement])),
        device_memory=None,
        measure=False,
        say=lambda _: None,
    )
    return row.needs[str(placement)].total


def placement_of(world: int) -> Placement:
    """Return how accelerate is configured to distribute training."""
    asked: Sharding = "none"
    if process_environment().shards_weights:
        asked = "fsdp2"
    return Placement(
        sharding=asked if world > 1 else "none", devices=world if asked != "none" else 1
    )


def device_memory(device: torch.device) -> int:
    """Return the bytes of the GPU, or this process's share of the free host memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    ranks = process_environment().local_world
    return min(machine_memory(), int(psutil.virtual_memory().available)) // ranks


def check_disk(folder: Path, model: nn.Module, *, kept: int, average: bool = False) -> Check:
    """Compare the size of the checkpoints that will be kept with the free disk space.

    Args:
        folder: run folder.
        model: the module that is trained.
        kept: number of checkpoints kept.
        average: whether each has a running average of the weights.
    """
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    checkpoint = (4 if average else 3) * weights  # AdamW has two states
    needed = (kept + 1) * checkpoint + weights  # one is written before one is removed
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    present = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*") if path.is_file())
    found = (
        f"{format_bytes(needed)} for {count_noun(kept, 'checkpoint')} of "
        f"{format_bytes(checkpoint)}, one more while it is written, and the encoder; "
        f"{format_bytes(free)} free for {folder}"
    )
    if not os.access(place, os.W_OK):
        return Check(
            name="disk",
            verdict="problem",
            found=f"{place} is not writable",
            change="choose another folder with --folder",
        )
    if needed - present > free:
        return Check(
            name="disk",
            verdict="problem",
            found=found,
            change="free disk space, lower training.keep_last, raise training.keep_every if it is "
            "set, or choose another disk with --folder",
        )
    return Check(name="disk", verdict="ok", found=found)
