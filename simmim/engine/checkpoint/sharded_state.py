"""What a process holds of a model and its optimiser: named, in pieces, to be saved and restored.

Parameters that FSDP2 has cut are DTensors, cut along their first axis: every process holds rows of
them. Everything else is held whole by all, and rank 0 speaks for it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simmim.engine.checkpoint.shard_files import Parts, Piece, whole


def as_dtensor(tensor: Tensor) -> Any:
    """Return the tensor as the DTensor that it is; None where it is an ordinary one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (half a second)

    return tensor if isinstance(tensor, DTensor) else None


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor as an ordinary one; of one in shards, all that hold some call together."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return tensor
    gathered: Tensor = sharded.full_tensor()
    return gathered


def is_sharded(module: nn.Module) -> bool:
    """Tell whether processes share the parameters of a module among them."""
    return any(as_dtensor(parameter) is not None for parameter in module.parameters())


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Return which rows of a tensor this process holds, from and to before."""
    rows = tensor.shape[0] if tensor.ndim else 1
    sharded = as_dtensor(tensor)
    if sharded is None:
        return 0, rows
    first, last = 0, rows
    for axis, placement in enumerate(sharded.placements):
        if placement.is_shard():
            assert placement.dim == 0, "shards are cut along axis 0"
            part = -(-(last - first) // sharded.device_mesh.size(axis))
            begin = first + part * sharded.device_mesh.get_local_rank(axis)
            first, last = min(begin, last), min(begin + part, last)
    return first, last


def piece_of(tensor: Tensor, rank: int) -> Piece | None:
    """Return what this process has to write of a tensor; None where another one does."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return whole(tensor.detach()) if rank == 0 else None
    first, last = rows_of(tensor)
    is_copy = any(
        placement.is_replicate() and sharded.device_mesh.get_local_rank(axis)
        for axis, placement in enumerate(sharded.placements)
    )
    if is_copy or first == last:
        return None
    rows = sharded.to_local().detach()
    assert len(rows) == last - first
    return Piece(rows, first, tuple(tensor.shape))


def model_pieces(model: nn.Module, rank: int) -> dict[str, Piece]:
    """Return what this process has to write of a model's weights and buffers."""
    return _pieces(model.state_dict(), rank)


def optimizer_pieces(optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Piece]:
    """Return what this process has to write of an optimiser's state: `exp_avg/NAME` and so on."""
    tensors = {
        f"{key}/{name}": value
        for name, parameter in named_parameters(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    return _pieces(tensors, rank)


def _pieces(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Piece]:
    found = {name: piece_of(tensor, rank) for name, tensor in tensors.items()}
    return {name: piece for name, piece in found.items() if piece is not None}


def optimizer_values(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return of each parameter, by its name, what its state holds besides tensors."""
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
def restore_model(model: nn.Module, parts: Parts) -> None:
    """Copy weights into a model, or a part of one; each process reads the rows it holds.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; nothing was changed then.
    """
    expected = model.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in parts.shapes]
    problems += [f"unexpected: {name}" for name in parts.shapes if name not in expected]
    problems += [
        f"shape of {name}: {parts.shapes[name]}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in parts.shapes and parts.shapes[name] != tuple(tensor.shape)
    ]
    if problems:
        raise ValueError(
            f"{parts.folder} does not fit {type(model).__name__}; use the recipe of that "
            "run:\n  " + "\n  ".join(problems)
        )
    for name, tensor in expected.items():
        sharded = as_dtensor(tensor)
        here = tensor if sharded is None else sharded.to_local()
        here.copy_(parts.read(name, *rows_of(tensor)))


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parts: Parts, values: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimiser a saved state, each parameter's by its name.

    Weight decay, betas and the like stay those of `optimizer`: the recipe has the last word.

    Raises:
        ValueError: a parameter of `optimizer` is in neither `parts` nor `values`.
    """
    parameters = named_parameters(optimizer)
    missing = sorted(set(parameters) - set(values))
    if missing:
        raise ValueError(
            f"{parts.folder} lacks the state of {', '.join(missing)}: it is of another model. "
            "Resume with the recipe of that run."
        )
    keys: dict[str, list[str]] = {}
    for full in parts.shapes:
        key, _, name = full.partition("/")
        keys.setdefault(name, []).append(key)
    optimizer.state.clear()
    fused = {
        name: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    for name, parameter in parameters.items():
        state: dict[str, Any] = dict(values[name])
        for key in keys.get(name, ()):
            on_cpu = key == "step" and not fused[name]
            device = torch.device("cpu") if on_cpu else parameter.device
            state[key] = _like(parameter, parts, f"{key}/{name}", device)
        if state:
            optimizer.state[parameter] = state


def _like(parameter: Tensor, parts: Parts, name: str, device: torch.device) -> Tensor:
    """Read a tensor of the optimiser's state, cut as its parameter is if it has the same shape."""
    sharded = as_dtensor(parameter)
    if sharded is None or parts.shapes[name] != tuple(parameter.shape):
        return parts.read(name).to(device)
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (half a second)

    wrap: Callable[..., Tensor] = DTensor.from_local
    return wrap(
        parts.read(name, *rows_of(parameter)).to(device),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
