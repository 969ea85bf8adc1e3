"""Exponential moving average of the weights (EMA).

It has one tensor for each trained parameter, sharded as the parameter is. In a checkpoint it stands
beside the optimiser's tensors, as `ema/NAME`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from simmim.engine.checkpoint.directory import OPTIMIZER
from simmim.engine.checkpoint.shard_files import ShardFiles, TensorShard
from simmim.engine.checkpoint.sharded_state import (
    AVERAGE,
    local_rows,
    local_tensor,
    named_parameters,
    read_like,
    shards_to_write,
)


class RunningAverage:
    """Averages of the parameters of an optimiser, of those that it has updated so far.

    Args:
        optimizer: the optimiser, built with the names of its parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, decay: float, step: int) -> None:
        """Update the averages after an optimiser step.

        Args:
            decay: fraction of the average that is kept. In early steps it is (1 + step) / (10 +
                step) if that is less; otherwise its start would dominate the average of a short
                training.
            step: number of the step, from 1.
        """
        decay = min(decay, (1 + step) / (10 + step))
        averages, weights = [], []
        for name, parameter in named_parameters(self._optimizer).items():
            if not self._optimizer.state.get(parameter):
                continue  # no gradient so far: the optimiser creates its state with the first one
            if name not in self._averages:
                self._averages[name] = parameter.detach().clone()
            averages.append(local_tensor(self._averages[name]))
            weights.append(local_tensor(parameter.detach()))
        if averages:
            update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            update(averages, weights, step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Swap the averages with the weights within this context, in which no step may be taken.

        Parameters without an average stay as they are.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        parameters = named_parameters(self._optimizer)
        for name, average in self._averages.items():
            weight, held = local_tensor(parameters[name].detach()), local_tensor(average)
            trained = weight.clone()
            weight.copy_(held)
            held.copy_(trained)

    def shards(self, rank: int) -> dict[str, TensorShard]:
        """Return the averages that this rank writes into a checkpoint."""
        named = {f"{AVERAGE}/{name}": average for name, average in self._averages.items()}
        return shards_to_write(named, rank)

    def load(self, path: Path, *, verified: bool = False) -> None:
        """Load the averages of a checkpoint; if it has none they start with the next step.

        Args:
            path: a checkpoint.
            verified: the digests have been compared already.

        Raises:
            ValueError: a file cannot be read, or an average has another shape than its parameter.
        """
        with ShardFiles(path, OPTIMIZER, verified=verified) as files:
            self._averages = {
                name: read_like(parameter, files, f"{AVERAGE}/{name}", parameter.device)
                for name, parameter in named_parameters(self._optimizer).items()
                if f"{AVERAGE}/{name}" in files.shapes
            }


@torch.no_grad()
def load_average(
    path: Path,
    module: nn.Module,
    prefix: str = "",
    *,
    adapt: Callable[[ShardFiles, str], None] | None = None,
) -> bool:
    """Replace the weights of a module by the averages in a checkpoint.

    Args:
        path: a checkpoint.
        module: the trained module, or a submodule; each rank fills the rows it holds.
        prefix: dotted name of the submodule, with a dot at the end.
        adapt: replaces tensors of the files whose names begin with a prefix; None for none.

    Returns:
        Whether the checkpoint has averages.
    """
    found = False
    with ShardFiles(path, OPTIMIZER) as files:
        if adapt is not None:
            adapt(files, f"{AVERAGE}/{prefix}")
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
