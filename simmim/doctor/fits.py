"""Whether a training fits this machine, counted before it starts."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.format.text import count_noun
from simmim.bench.choices import GIB
from simmim.doctor.estimates import (
    HEAD_ROOM,
    advise_accumulation,
    clip_length,
    frozen_memory,
    least_memory,
    most_activations,
    most_parameters,
    share_kept,
)
from simmim.doctor.machine import machine_memory
from simmim.doctor.memory import FULL, advise, blocks_of, needed_memory, placement_of, step_case
from simmim.environment import process_environment
from simmim.tasks.recipe import TaskRecipe

PROCESS = 0.4 * GIB
"""Bytes of a process with torch, before it builds a model."""
WORKER = 0.15 * GIB
"""Bytes of a data worker, without its batches."""
COPIES = 3
"""Copies of the weights' size that a checkpoint holds in host memory: weights and two states."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory for each process of a training."""

    there: int
    """Bytes of the GPU, or of this machine by the number of its processes."""
    processes: int
    """Number of processes on this machine."""
    world: int
    """Number of processes on all machines."""
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Need:
    """The memory that each process needs."""

    least: bool
    """Whether training may need more."""
    number: float
    """Bytes."""
    change: str
    """What to set to need less."""


def check_fits(recipe: Any) -> None:
    """Compare the memory of a training step on all ranks of this machine with the machine's.

    A step that clearly fits, or clearly does not, is told from its sizes in no time; another is
    simulated, which takes a few seconds. On a GPU, a step that does not fit only causes a warning.

    Raises:
        ValueError: training does not fit the memory of the machine.
    """
    if process_environment().local_rank or recipe.training.optimizer.freeze == "all":
        return  # a head alone needs the memory of inference
    room = find_room()
    if room is None:
        return
    micro = max(1, recipe.training.batch_size // room.world // recipe.training.accumulation)
    need = count_need(recipe, micro, room)
    if need is None or need.number <= room.there:
        return
    images = count_noun(micro, recipe.SAMPLES.removesuffix("s"))
    least = "at least " if need.least else ""
    found = f"training needs {least}{_gib(need.number)} per process for micro-batches of {images}"
    if room.on_gpu:
        sys.stderr.write(f"WARNING: {found}, and this GPU has {_gib(room.there)}.\n")
        return
    number = room.processes
    raise ValueError(
        f"{found}, {_gib(need.number * number)} for {count_noun(number, 'process', 'processes')}, "
        f"and this machine has {_gib(room.there * number)}. To fit it: {need.change}; or choose a "
        "smaller encoder.variant or data.image_size. --ignore-memory starts training all the same."
    )


def find_room() -> Room | None:
    """Return the memory for each process; None if it is not known beforehand."""
    environment = process_environment()
    processes = environment.local_world
    on_gpu = torch.accelerator.is_available()
    if on_gpu and not torch.cuda.is_available():
        return None  # its memory is the machine's, and grows with what is in use
    return Room(
        there=torch.cuda.mem_get_info()[1] if on_gpu else machine_memory() // processes,
        processes=processes,
        world=environment.world,
        on_gpu=on_gpu,
    )


def most_memory(recipe: TaskRecipe, micro: int, room: Room) -> float:
    """Return an upper bound of the bytes that a process needs, from sizes alone.

    Args:
        recipe: the recipe.
        micro: samples of a micro-batch.
        room: the memory there is, and the processes that share it.
    """
    config = recipe.encoder.config(recipe.data.image_size)
    average = recipe.training.ema_decay is not None
    weights = 4.0 * most_parameters(config) / placement_of(room.world).devices
    states = weights * (4 + average) + checkpoint_copies(recipe, room)
    trained = states + micro * most_activations(config) * clip_length(recipe)
    return trained + frozen_memory(recipe, micro) + outside(recipe, room)


def count_need(recipe: TaskRecipe, micro: int, room: Room) -> Need | None:
    """Return the memory that a process needs, None if it clearly fits; arguments as above."""
    most, fixed = most_memory(recipe, micro, room), most_memory(recipe, 0, room)
    if most <= FULL * room.there:
        return None
    estimated = recipe.step_for_estimate
    config = recipe.encoder.config(recipe.data.image_size)
    placement = placement_of(room.world)
    share = max(1, recipe.training.batch_size // room.world)
    fitting = (FULL * room.there - fixed) / (most - fixed) * micro
    change = advise_accumulation(share, fitting)
    least = least_memory(recipe, config, micro, placement)
    if least > room.there:
        return Need(least=True, number=least, change=change)
    if estimated is None:  # the encoder alone; heads and boxes come on top
        number = fixed + (most - fixed) / HEAD_ROOM * share_kept(recipe)
        return Need(least=False, number=number, change=change)
    case = step_case(recipe, micro, estimated)
    sys.stderr.write(
        f"counting the memory of a training step with {blocks_of(case)} blocks, "
        "which takes a few seconds\n"
    )
    number = needed_memory(case, placement) + outside(recipe, room)
    number += checkpoint_copies(recipe, room) + frozen_memory(recipe, micro)
    if number > room.there and not room.on_gpu:
        change = advise(case, placement, round(number), room.there, share)
    return Need(least=False, number=number, change=change)


def checkpoint_copies(recipe: TaskRecipe, room: Room) -> float:
    """Return the bytes of a checkpoint in the memory that training shares with it."""
    if room.on_gpu:
        return 0.0
    config = recipe.encoder.config(recipe.data.image_size)
    return COPIES * 4.0 * most_parameters(config) / placement_of(room.world).devices


def outside(recipe: TaskRecipe, room: Room) -> float:
    """Return the bytes of a process and its data workers, besides the model."""
    return 0.0 if room.on_gpu else PROCESS + WORKER * recipe.data.workers


def check_weights_fit(recipe: TaskRecipe) -> None:
    """Refuse weights that no machine like this one can hold, before a model is built.

    Raises:
        ValueError: weights, gradients and optimiser alone need more than this machine's memory.
    """
    room = find_room()
    if room is None or recipe.architecture_source is not None:
        return
    config = recipe.encoder.config(recipe.data.image_size)
    least = least_memory(recipe, config, 0, placement_of(room.world))
    if least > room.there:
        where = "this GPU" if room.on_gpu else "this machine"
        raise ValueError(
            f"weights, gradients and optimiser need at least {_gib(least)} per process, and "
            f"{where} has {_gib(room.there)} for each: choose a smaller encoder.variant, or lower "
            "encoder.embed_dim, encoder.depths or encoder.mlp_ratio."
        )


def _gib(number: float) -> str:
    return f"{number / GIB:,.1f} GiB"
