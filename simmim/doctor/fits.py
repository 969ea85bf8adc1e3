"""Whether a training fits this machine, counted before it starts."""

import os
import sys
from typing import Any

import torch

from data_prep.format.text import count_noun
from simmim.bench.memory import GIB
from simmim.doctor.machine import machine_memory
from simmim.doctor.memory import FULL, advise, needed_memory, placement_of, step_case
from simmim.engine.distributed.environment import requested_cpu_processes
from simmim.tasks.recipe import TaskRecipe
from swinv2.config import SwinV2Config

PROCESS = 0.4 * GIB
"""Bytes of a process with torch, before it builds a model."""
COPIES = 3
"""Copies of the weights' size that a checkpoint holds in host memory: weights and two states."""
HEAD_ROOM = 1.6
"""Factor by which `most_activations` may exceed the activations of a step in fp32."""
SHARE_KEPT = {"none": 1.0, "attention": 0.7, "full": 0.1}
"""Share of the activations that is kept until the backward, by activation checkpointing."""


def check_fits(recipe: Any) -> None:
    """Compare the memory of a training step on all ranks of this machine with the machine's.

    A step that clearly fits is counted from its sizes in no time; another is simulated, which takes
    some seconds. On a GPU a step that does not fit is warned of.

    Raises:
        ValueError: training does not fit the memory of the machine.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) or not isinstance(recipe, TaskRecipe):
        return
    processes = max(requested_cpu_processes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    world = max(processes, int(os.environ.get("WORLD_SIZE", "1")))
    on_gpu = torch.accelerator.is_available()
    if on_gpu and not torch.cuda.is_available():
        return  # its memory is the machine's, and grows with what is in use
    there = torch.cuda.mem_get_info()[1] if on_gpu else machine_memory() // processes
    other = 0.0 if on_gpu else PROCESS
    training = recipe.training
    micro = max(1, training.batch_size // world // training.accumulation)
    config = recipe.encoder.config(recipe.data.image_size)
    weights = 4.0 * most_parameters(config)
    states = weights * (4 + (training.ema_decay is not None) + (0 if on_gpu else COPIES))
    sharded = placement_of(world)
    states /= sharded.devices
    most = most_activations(config) * micro * _clip_length(recipe)
    if states + most + other <= FULL * there:
        return
    cell = recipe.mask_cell_for_estimate
    if cell is None:  # the encoder alone; heads and boxes come on top
        needed = states + other + most / HEAD_ROOM * _share_kept(recipe)
    else:
        sys.stderr.write("counting the memory of a training step, some seconds\n")
        case = step_case(recipe, micro, cell)
        counted = needed_memory(case, sharded)
        needed = counted + other + (0 if on_gpu else COPIES * weights / sharded.devices)
    if needed <= there:
        return
    found = (
        f"training needs {_gib(needed)} per process for micro-batches of "
        f"{count_noun(micro, recipe.SAMPLES.removesuffix('s'))}"
    )
    if on_gpu:
        sys.stderr.write(f"WARNING: {found}, and this GPU has {_gib(there)}.\n")
        return
    change = (
        f"lower training.batch_size or raise training.accumulation (now {training.accumulation})"
    )
    if cell is not None:
        share = training.batch_size // world
        change = advise(case, sharded, round(needed), there, share)
    raise ValueError(
        f"{found}, {_gib(needed * processes)} for {count_noun(processes, 'process', 'processes')}, "
        f"and this machine has {_gib(there * processes)}. To fit it: {change}; or choose a smaller "
        "encoder.variant or data.image_size. --ignore-memory starts training all the same."
    )


def most_parameters(config: SwinV2Config) -> float:
    """Return an upper estimate of the number of an encoder's parameters, from its sizes."""
    blocks = sum(
        depth * dim * dim * (4 + 2 * config.mlp_ratio)
        for depth, dim in zip(config.depths, config.stage_dims, strict=True)
    )
    merges = sum(8 * dim * dim for dim in config.stage_dims[:-1])
    decoder = config.num_features * config.strides[-1] ** 2 * config.in_channels
    return 1.05 * (blocks + merges + decoder) + 512 * sum(
        depth * heads for depth, heads in zip(config.depths, config.num_heads, strict=True)
    )


def most_activations(config: SwinV2Config) -> float:
    """Return an upper estimate of the bytes of activations of an image, in fp32.

    A block keeps about 10 maps of its width, 3 of its MLP's, and two sets of attention weights.
    """
    return sum(
        4.0
        * depth
        * (rows * columns)
        * (dim * (10 + 3 * config.mlp_ratio) + 2 * heads * window[0] * window[1])
        for (rows, columns), dim, heads, window, depth in zip(
            config.stage_resolutions,
            config.stage_dims,
            config.num_heads,
            config.stage_windows,
            config.depths,
            strict=True,
        )
    )


def _share_kept(recipe: TaskRecipe) -> float:
    """Return the least share of the activations in fp32 that a step keeps."""
    chosen = recipe.execution.checkpointing
    choices = [chosen] if isinstance(chosen, str) else list(chosen)
    kept = min(SHARE_KEPT[choice] for choice in choices)
    return kept * (1.0 if recipe.training.precision == "fp32" else 0.6)


def _clip_length(recipe: TaskRecipe) -> float:
    """Return the number of maps of a sample: the patches of a clip along time, else 1."""
    data: Any = recipe.data
    return max(1.0, getattr(data, "frames", 1) / getattr(recipe.encoder, "frame_patch", 1))


def _gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"
