"""FSDP2: weights, gradients and optimiser state cut into as many parts as there are devices.

Each block of the encoder is a unit, gathered for its forward and its backward and let go after
each; what is left, the embedding, merges, norms and heads, is one more.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from swinv2 import SwinV2
from swinv2.blocks import Block

OUTSIDE_FORWARD = ("embed", "encode", "features")
"""Methods of the encoder that are called like its forward."""


@dataclass(frozen=True, kw_only=True)
class ShardingUnit:
    """Parameters that are gathered together."""

    name: str
    """Dotted name of the block; empty for what is outside all blocks."""
    parameters: tuple[str, ...]
    """Dotted names."""
    size: int
    """Numbers in them."""


def sharding_units(model: nn.Module) -> list[ShardingUnit]:
    """Return the units that `shard_by_block` makes of a model, what is outside the blocks last.

    The model may be on the meta device.

    Raises:
        ValueError: there is no block in it.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks of an encoder to shard by.")
    members: dict[str, list[tuple[str, int]]] = {name: [] for name in [*blocks, ""]}
    for name, parameter in model.named_parameters():
        unit = next((block for block in blocks if name.startswith(f"{block}.")), "")
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
    mesh: DeviceMesh,
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
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions; sharding takes one of its axes.")
    sharding_units(model)  # raises where there are no blocks
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(
                module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
            )
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if isinstance(model, SwinV2):
        for name in OUTSIDE_FORWARD:
            register_fsdp_forward_method(model, name)


@contextmanager
def sharding_left_to_us() -> Iterator[None]:
    """Let an Accelerator that is built within not know of FSDP.

    It would shard in its own way: gradients averaged in bfloat16, and parameters told apart by
    where they lie in memory, which those of which a process holds no row have not.
    """
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked


def shard_for_training(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard what is trained over all processes, in place and in the precision of training.

    What accelerate's config file says of FSDP is followed as far as `check_sharding` lets it pass.
    """
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    shard_by_block(
        module,
        init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        param_dtype=precision,
        reshard_after_forward=reshard != "false",
    )
    if precision is not None:
        forward = module.forward

        def in_precision(*args: Any) -> Any:
            with accelerator.autocast():
                return forward(*args)

        module.forward = in_precision


def is_asked_for() -> bool:
    """Tell whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding() -> None:
    """Refuse what accelerate's configuration asks for and is not done.

    Raises:
        ValueError: it asks for DeepSpeed, FSDP1, offloading, or checkpointing of activations.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "accelerate was told to use DeepSpeed, which is not supported: FSDP2 shards the same. "
            "For ZeRO 3 take jobs/accelerate/fsdp2.yaml; for ZeRO 1 and 2 set "
            "fsdp_reshard_after_forward to false in it."
        )
    if not is_asked_for():
        return
    asked = {name: os.environ.get(name, "").lower() for name in REFUSED}
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("set fsdp_version to 2 in accelerate's config: FSDP1 is not supported.")
    for name, value in asked.items():
        if value == "true":
            raise ValueError(f"set {name.lower()} to false in accelerate's config: {REFUSED[name]}")


REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "the recipe has execution.checkpointing for it.",
    "FSDP_OFFLOAD_PARAMS": "weights stay on the devices; more of them make the shards smaller.",
}
"""Settings of accelerate that would be dropped unseen, and what to do instead."""


@contextmanager
def without_exchange(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within, a backward adds to the gradients of this process, and nothing is exchanged."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(module):
            yield


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within, each process holds all weights, in the precision they are computed in.

    All enter together, and then each may compute, without gradients, as often as it likes: what is
    evaluated need not be the same everywhere. Nothing happens where weights are whole already.
    """
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    hooks = []
    for unit in units:
        unit.unshard()
        # They would gather and let go, and wait for processes that do not compute.
        hooks.append((unit, unit._forward_pre_hooks, unit._forward_hooks))
        unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for unit, before, after in hooks:
            unit._forward_pre_hooks, unit._forward_hooks = before, after
            unit.reshard()
