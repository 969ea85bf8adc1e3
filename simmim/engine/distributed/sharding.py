"""FSDP2: weights, gradients and optimiser state cut into as many parts as there are devices.

Each block of the encoder is a unit, gathered for its forward and its backward and let go after
each; what is left, the embedding, merges, norms and heads, is one more. Each batch norm of a head
is a unit too, in its own precision: its running means are, and they take no other weights.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from swinv2.blocks import Block
from swinv2.encoder import HierarchicalEncoder

if TYPE_CHECKING:  # FSDP takes most of a second to import, so it is where it is used
    from torch.distributed.device_mesh import DeviceMesh

OUTSIDE_FORWARD = ("embed", "encode", "features")
"""Methods of the encoder that are called like its forward."""


@dataclass(frozen=True, kw_only=True)
class ShardingUnit:
    """Parameters that are gathered together."""

    name: str
    """Dotted name of the block or batch norm; empty for what is outside all of them."""
    parameters: tuple[str, ...]
    """Dotted names."""
    size: int
    """Numbers in them."""


def sharding_units(model: nn.Module) -> list[ShardingUnit]:
    """Return the units that `shard_by_block` makes of a model, what is outside all others last.

    The model may be on the meta device.

    Raises:
        ValueError: there is no block in it.
    """
    if not any(isinstance(module, Block) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no blocks of an encoder to shard by.")
    units = [
        name for name, module in model.named_modules() if isinstance(module, Block | _BatchNorm)
    ]
    members: dict[str, list[tuple[str, int]]] = {name: [] for name in [*units, ""]}
    for name, parameter in model.named_parameters():
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), "")
        members[unit].append((name, parameter.numel()))
    return [
        ShardingUnit(
            name=unit,
            parameters=tuple(name for name, _ in found),
            size=sum(size for _, size in found),
        )
        for unit, found in members.items()
    ]


def shard_size(model: nn.Module, *, rank: int, world: int) -> int:
    """Return how many numbers of its parameters one of `world` devices keeps.

    Each parameter is cut along its first axis into equal parts, the last of them shorter or empty.
    """
    total = 0
    for parameter in model.parameters():
        rows = len(parameter)
        part = -(-rows // world)
        kept = min(max(rows - rank * part, 0), part)
        total += parameter.numel() // rows * kept
    return total


def shard_by_block(
    model: nn.Module,
    mesh: "DeviceMesh",
    *,
    param_dtype: torch.dtype | None = torch.bfloat16,
    reduce_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a model with an encoder in it over the devices of a mesh, in place.

    Optimisers are to be built afterwards: parameters become DTensors. Checkpointing and compiling
    of blocks (`SwinV2.set_execution`, `compile_blocks`) work as before.

    Args:
        model: an encoder, or a module that holds one and whose forward calls it.
        mesh: one-dimensional.
        param_dtype: what weights are gathered and computed in; None for their own. The shards,
            which the optimiser updates, keep theirs: float32, if that is what the model is in.
        reduce_dtype: what gradients are averaged in; None for `param_dtype`.
        reshard_after_forward: let a block's weights go after its forward, and gather them again
            for its backward: less memory, and half as much traffic again.

    Raises:
        ValueError: the model has no blocks, or the mesh has more than one dimension.
    """
    from torch.distributed.fsdp import (  # noqa: PLC0415
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions; sharding takes one of its axes.")
    sharding_units(model)  # raises where there are no blocks
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    own = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(
                module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
            )
        elif isinstance(module, _BatchNorm):
            fully_shard(module, mesh=mesh, mp_policy=own, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if isinstance(model, HierarchicalEncoder):
        for name in OUTSIDE_FORWARD:
            register_fsdp_forward_method(model, name)


def shard_for_training(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard what is trained over all processes, in place and in the precision of training.

    What accelerate's config file says of FSDP is followed, so far as `check_parallelism` allows it.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    shard_by_block(
        module,
        init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        param_dtype=precision,
        reshard_after_forward=reshard != "false",
    )
    compute_in_precision(module, accelerator)


def compute_in_precision(module: nn.Module, accelerator: Accelerator) -> None:
    """Let the forward of a module compute in the precision of training, whoever calls it."""
    if accelerator.mixed_precision == "no":
        return
    forward = module.forward

    def in_precision(*args: Any, **options: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **options)

    module.forward = in_precision
