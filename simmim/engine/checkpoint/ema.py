"""Exponential moving average of the weights (EMA).

It is kept in the optimiser's state, one tensor per parameter, so it is sharded, saved and resumed
with that state. A parameter without an average has never been updated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from simmim.engine.checkpoint.directory import OPTIMIZER
from simmim.engine.checkpoint.shard_files import ShardFiles
from simmim.engine.checkpoint.sharded_state import (
    local_rows,
    local_tensor,
    named_parameters,
)

AVERAGE = "ema"
"""Key of the average in the state of a parameter."""


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Update the averages after an optimiser step.

    Args:
        optimizer: parameters that it has not updated yet get no average.
        decay: fraction of the average that is kept. In early steps it is (1 + step) / (10 + step)
            if that is less; otherwise its start would dominate the average of a short training.
        step: number of the step, from 1.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages, weights = [], []
    for parameter in named_parameters(optimizer).values():
        state = optimizer.state.get(parameter)
        if not state:  # no gradient so far: the optimiser creates its state with the first one
            continue
        if AVERAGE not in state:
            state[AVERAGE] = parameter.detach().clone()
        averages.append(local_tensor(state[AVERAGE]))
        weights.append(local_tensor(parameter.detach()))
    if averages:
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update(averages, weights, step)


def forget_average(optimizer: torch.optim.Optimizer) -> None:
    """Remove the averages from the optimiser's state."""
    for parameter in named_parameters(optimizer).values():
        if parameter in optimizer.state:
            optimizer.state[parameter].pop(AVERAGE, None)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Swap the averages, if there are any, with the weights within this context.

    No step may be taken within.
    """
    _swap(optimizer)
    try:
        yield
    finally:
        _swap(optimizer)


@torch.no_grad()
def _swap(optimizer: torch.optim.Optimizer) -> None:
    for parameter in named_parameters(optimizer).values():
        state = optimizer.state.get(parameter)
        if state and AVERAGE in state:
            weight, average = local_tensor(parameter.detach()), local_tensor(state[AVERAGE])
            trained = weight.clone()
            weight.copy_(average)
            average.copy_(trained)


@torch.no_grad()
def load_average(path: Path, module: nn.Module, prefix: str = "") -> bool:
    """Replace the weights of a module by the averages in a checkpoint.

    Args:
        path: a checkpoint.
        module: the trained module, or a submodule; each rank fills the rows it holds.
        prefix: dotted name of the submodule, with a dot at the end.

    Returns:
        Whether the checkpoint has averages.
    """
    found = False
    with ShardFiles(path, OPTIMIZER) as files:
        for name, parameter in module.named_parameters():
            saved = f"{AVERAGE}/{prefix}{name}"
            if saved in files.shapes:
                rows = files.read(saved, *local_rows(parameter))
                local_tensor(parameter.detach()).copy_(rows)
                found = True
    return found


def read_average(path: Path) -> dict[str, Tensor]:
    """Return the averages in a checkpoint by parameter name; empty if there are none."""
    with ShardFiles(path, OPTIMIZER) as files:
        names = [name for name in files.shapes if name.startswith(f"{AVERAGE}/")]
        return {name.removeprefix(f"{AVERAGE}/"): files.read(name) for name in names}
