"""State of a model and its optimiser as named tensor shards, to save and to restore.

Parameters that FSDP2 has sharded are DTensors, cut along their first axis: every rank holds rows of
them. All ranks hold everything else whole, and rank 0 writes it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simmim.engine.checkpoint.shard_files import ShardFiles, TensorShard, whole_tensor

AVERAGE = "ema"
"""Key of the running averages, which are saved beside the optimiser's state."""
LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", AVERAGE)
"""Keys of tensors that have the shapes of the parameters."""
MOST_PROBLEMS = 20
"""Maximum number of tensors that a message lists."""


def as_dtensor(tensor: Tensor) -> Any:
    """Return the tensor itself if it is a DTensor, else None."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (half a second)

    return tensor if isinstance(tensor, DTensor) else None


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor unsharded; for a DTensor all ranks of its mesh must call this together."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return tensor
    gathered: Tensor = sharded.full_tensor()
    return gathered


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this rank holds; they share its memory."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return tensor
    local: Tensor = sharded.to_local()
    return local


def is_sharded(module: nn.Module) -> bool:
    """Return whether the parameters of a module are sharded over ranks."""
    return any(as_dtensor(parameter) is not None for parameter in module.parameters())


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the range of rows of a tensor that this rank holds, the end exclusive."""
    rows = tensor.shape[0] if tensor.ndim else 1
    sharded = as_dtensor(tensor)
    if sharded is None:
        return 0, rows
    first, last = 0, rows
    for axis, placement in enumerate(sharded.placements):
        if placement.is_shard():
            assert placement.dim == 0, "shards are cut along axis 0"
            size = -(-(last - first) // sharded.device_mesh.size(axis))
            begin = first + size * sharded.device_mesh.get_local_rank(axis)
            first, last = min(begin, last), min(begin + size, last)
    return first, last


def shard_to_write(tensor: Tensor, rank: int) -> TensorShard | None:
    """Return the shard of a tensor that this rank writes; None if another rank does."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return whole_tensor(tensor.detach()) if rank == 0 else None
    first, last = local_rows(tensor)
    is_copy = any(
        placement.is_replicate() and sharded.device_mesh.get_local_rank(axis)
        for axis, placement in enumerate(sharded.placements)
    )
    if is_copy or first == last:
        return None
    rows = local_tensor(tensor).detach()
    assert len(rows) == last - first
    return TensorShard(rows, first, tuple(tensor.shape))


def model_shards(model: nn.Module, rank: int) -> dict[str, TensorShard]:
    """Return the weights and buffers that this rank writes."""
    return shards_to_write(model.state_dict(), rank)


def optimizer_shards(optimizer: torch.optim.Optimizer, rank: int) -> dict[str, TensorShard]:
    """Return the tensors of the optimiser's state that this rank writes: `exp_avg/NAME` etc."""
    tensors = {
        f"{key}/{name}": value
        for name, parameter in named_parameters(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    return shards_to_write(tensors, rank)


def shards_to_write(tensors: Mapping[str, Tensor], rank: int) -> dict[str, TensorShard]:
    """Return the shards of tensors that this rank writes, by name."""
    found = {name: shard_to_write(tensor, rank) for name, tensor in tensors.items()}
    return {name: shard for name, shard in found.items() if shard is not None}


def optimizer_scalars(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter, by name, without its tensors."""
    return {
        name: {
            key: value
            for key, value in optimizer.state.get(parameter, {}).items()
            if not isinstance(value, Tensor)
        }
        for name, parameter in named_parameters(optimizer).items()
    }


def named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the parameters of an optimiser that was built with their names."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


@torch.no_grad()
def restore_model(model: nn.Module, files: ShardFiles) -> None:
    """Copy weights into a model; each rank reads the rows it holds.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the model is unchanged.
    """
    expected = model.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in files.shapes]
    problems += [f"unexpected: {name}" for name in files.shapes if name not in expected]
    problems += [
        f"shape of {name}: {files.shapes[name]}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in files.shapes and files.shapes[name] != tuple(tensor.shape)
    ]
    if problems:
        raise ValueError(
            f"{files.folder} does not fit {type(model).__name__}; use the recipe of that run:\n  "
            + _first_lines(problems)
        )
    for name, tensor in expected.items():
        local_tensor(tensor).copy_(files.read(name, *local_rows(tensor)))


def _first_lines(problems: Sequence[str]) -> str:
    """Return problems as indented lines, at most MOST_PROBLEMS of them."""
    more = len(problems) - MOST_PROBLEMS
    shown = [*problems[:MOST_PROBLEMS], *([f"and {more:,} more"] if more > 0 else [])]
    return "\n  ".join(shown)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, files: ShardFiles, scalars: Mapping[str, Mapping[str, Any]]
) -> None:
    """Load the state of an optimiser by the names of its parameters.

    Hyperparameters such as weight decay and betas stay as they are in `optimizer`.

    Args:
        optimizer: optimiser to restore, whose state is replaced.
        files: the tensors of the state.
        scalars: the rest of the state, by parameter.

    Raises:
        ValueError: `scalars` lacks a parameter of `optimizer`, or a tensor has another shape.
    """
    parameters = named_parameters(optimizer)
    missing = sorted(set(parameters) - set(scalars))
    if missing:
        raise ValueError(
            f"{files.folder} lacks the optimiser state of {', '.join(missing)}: it belongs to "
            "another model. Resume with the recipe of that run."
        )
    keys: dict[str, list[str]] = {}
    for full in files.shapes:
        key, _, name = full.partition("/")
        keys.setdefault(name, []).append(key)
    wrong = [
        f"shape of {key}/{name}: {files.shapes[f'{key}/{name}']}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        for key in keys.get(name, ())
        if key in LIKE_PARAMETERS and files.shapes[f"{key}/{name}"] != tuple(parameter.shape)
    ]
    if wrong:
        raise ValueError(
            f"{files.folder} does not fit the optimiser; use the recipe of that run:\n  "
            + _first_lines(wrong)
        )
    optimizer.state.clear()
    fused = {
        name: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    for name, parameter in parameters.items():
        state: dict[str, Any] = dict(scalars[name])
        for key in keys.get(name, ()):
            if key == AVERAGE:
                continue
            on_cpu = key == "step" and not fused[name]
            device = torch.device("cpu") if on_cpu else parameter.device
            state[key] = read_like(parameter, files, f"{key}/{name}", device)
        if state:
            optimizer.state[parameter] = state


def read_like(parameter: Tensor, files: ShardFiles, name: str, device: torch.device) -> Tensor:
    """Read a tensor, sharded as a parameter if it has the same shape."""
    sharded = as_dtensor(parameter)
    if sharded is None or files.shapes[name] != tuple(parameter.shape):
        return files.read(name).to(device)
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (half a second)

    wrap: Callable[..., Tensor] = DTensor.from_local
    return wrap(
        files.read(name, *local_rows(parameter)).to(device),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
