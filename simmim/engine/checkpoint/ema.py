"""The running average of the weights over training: smoother than the last ones, often better.

It is kept as a part of the optimiser's state, one tensor a parameter, and so it is sharded, saved
and resumed as that is. A parameter without one has never been changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from simmim.engine.checkpoint.directory import OPTIMIZER
from simmim.engine.checkpoint.shard_files import Parts
from simmim.engine.checkpoint.sharded_state import as_dtensor, named_parameters, rows_of

AVERAGE = "ema"
"""Name of the average in the state of a parameter."""


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Move the averages towards the weights, after a step.

    Args:
        optimizer: has taken the step; what it has not touched yet has no average.
        decay: share of the average that stays. In early steps it is (1 + step) / (10 + step), if
            that is less: else a short training would end with an average of its beginning.
        step: number of the step, from 1.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages, weights = [], []
    for parameter in named_parameters(optimizer).values():
        state = optimizer.state.get(parameter)
        if not state:  # without gradients so far, and the optimiser makes its state when it has one
            continue
        if AVERAGE not in state:
            state[AVERAGE] = parameter.detach().clone()
        averages.append(_here(state[AVERAGE]))
        weights.append(_here(parameter.detach()))
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)


def forget_average(optimizer: torch.optim.Optimizer) -> None:
    """Drop the averages: they are of no more use where they are not updated."""
    for parameter in named_parameters(optimizer).values():
        if parameter in optimizer.state:
            optimizer.state[parameter].pop(AVERAGE, None)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the averages stand in the place of the weights; both are exchanged, not copied.

    Nothing happens where there are none. No step may be taken within.
    """
    _exchange(optimizer)
    try:
        yield
    finally:
        _exchange(optimizer)


@torch.no_grad()
def _exchange(optimizer: torch.optim.Optimizer) -> None:
    for parameter in named_parameters(optimizer).values():
        state = optimizer.state.get(parameter)
        if state and AVERAGE in state:
            weight, average = _here(parameter.detach()), _here(state[AVERAGE])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def _here(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return tensor
    local: Tensor = sharded.to_local()
    return local


@torch.no_grad()
def load_average(path: Path, module: nn.Module, below: str = "") -> bool:
    """Put the averages of a checkpoint in the place of a module's weights.

    Args:
        path: a checkpoint.
        module: what it is of, or a part of that; each process fills the rows it holds.
        below: the name of that part, with a dot at the end.

    Returns:
        Whether there are any.
    """
    found = False
    with Parts(path, OPTIMIZER) as parts:
        for name, parameter in module.named_parameters():
            saved = f"{AVERAGE}/{below}{name}"
            if saved in parts.shapes:
                _here(parameter.detach()).copy_(parts.read(saved, *rows_of(parameter)))
                found = True
    return found


def read_average(path: Path) -> dict[str, Tensor]:
    """Return the averages of a checkpoint by the names of their parameters; empty without any."""
    with Parts(path, OPTIMIZER) as parts:
        names = [name for name in parts.shapes if name.startswith(f"{AVERAGE}/")]
        return {name.removeprefix(f"{AVERAGE}/"): parts.read(name) for name in names}
