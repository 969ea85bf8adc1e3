"""FSDP2: weights, gradients and optimiser state sharded over the ranks.

Each block of the encoder is a unit: its weights are gathered for its forward and backward and freed
after each. Everything else (embedding, merges, norms and heads) is one more unit. Each batch norm
of a head is a unit of its own, in its own precision, because its running statistics are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from simmim.compat import without_forward_hooks
from simmim.engine.checkpoint.sharded_state import is_sharded
from simmim.environment import process_environment
from simmim.method.encoder_protocol import find_encoder, is_encoder

if TYPE_CHECKING:  # FSDP takes most of a second to import, so it is imported where it is used
    from torch.distributed.device_mesh import DeviceMesh

ENTRY_POINTS = ("embed", "encode", "features")
"""Methods of an encoder that are called like its forward."""


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, kw_only=True)
class ShardingUnit:
    """Parameters that are gathered together."""

    name: str
    """Dotted name of the block or batch norm; empty for everything outside them."""
    parameters: tuple[str, ...]
    """Dotted names."""
    size: int
    """Number of elements."""


def trains_in_shards(accelerator: Accelerator) -> bool:
    """Return whether the weights are sharded: FSDP was asked for, and there are several ranks."""
    return process_environment().shards_weights and accelerator.num_processes > 1


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the encoder in a model.

    Raises:
        ValueError: the model has no encoder.
    """
    return list(find_encoder(model).encoder.blocks)


def sharding_units(model: nn.Module) -> list[ShardingUnit]:
    """Return the units in which `shard_by_block` shards a model; the rest is the last one.

    The model may be on the meta device.

    Raises:
        ValueError: the model has no encoder.
    """
    blocks = set(encoder_blocks(model))
    units = [
        name
        for name, module in model.named_modules()
        if module in blocks or isinstance(module, BATCH_NORMS)
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
    """Return the number of parameter elements that a rank keeps.

    Each parameter is cut along its first axis into `world` equal shards, the last of which may be
    shorter or empty.
    """
    total = 0
    for parameter in model.parameters():
        rows = len(parameter)
        size = -(-rows // world)
        kept = min(max(rows - rank * size, 0), size)
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
    """Shard a model that contains an encoder over the devices of a mesh, in place.

    Build optimisers afterwards: parameters become DTensors. Checkpointing and compiling of blocks
    work as before.

    Args:
        model: an encoder, or a module that contains one and whose forward calls it.
        mesh: a one-dimensional mesh.
        param_dtype: dtype in which weights are gathered and used; None for their own. The shards,
            which the optimiser updates, keep theirs, float32 for example; so do the inputs of the
            model, whose losses they may be the targets of.
        reduce_dtype: dtype in which gradients are averaged; None for `param_dtype`.
        reshard_after_forward: free a block's weights after its forward, and gather them again for
            its backward: less memory, half as much communication again.

    Raises:
        ValueError: the model has no encoder, or the mesh has more than one dimension.
    """
    from torch.distributed.fsdp import (  # noqa: PLC0415
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions; shard over one of its axes.")
    blocks = set(encoder_blocks(model))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    # The encoder converts images itself; targets and what losses are divided by stay as precise.
    outermost = replace(policy, cast_forward_inputs=False)
    own = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for module in list(model.modules()):
        if module in blocks:
            fully_shard(
                module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
            )
        elif isinstance(module, BATCH_NORMS):
            fully_shard(module, mesh=mesh, mp_policy=own, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=outermost, reshard_after_forward=False)
    if mesh.device_type == "cpu":  # gloo of torch 2.8 returns sums where means are asked for
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    if is_encoder(model):
        for name in ENTRY_POINTS:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)


def shard_for_training(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard a module over all ranks, in place and in the precision of training.

    Of accelerate's configuration, `fsdp_reshard_after_forward` is followed.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    shard_by_block(
        module,
        init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        param_dtype=precision,
        reshard_after_forward=process_environment().reshards_after_forward,
    )
    if accelerator.mixed_precision != "no":
        _autocast_forward(module, accelerator)


def _autocast_forward(module: nn.Module, accelerator: Accelerator) -> None:
    """Run the forward of a module under autocast, whoever calls it."""
    forward = module.forward

    def in_precision(*args: Any, **options: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **options)

    module.forward = in_precision


def synchronise_norms(module: nn.Module, device: torch.device, processes: int) -> None:
    """Replace batch norms by ones that use the statistics of the whole batch, over all GPUs.

    Names, weights and running statistics stay. On CPUs, for which torch has no such norm, each rank
    uses the statistics of its own share.
    """
    if processes > 1 and device.type == "cuda":
        assert not isinstance(module, BATCH_NORMS)  # only submodules are replaced
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        convert(module)


@contextmanager
def no_gradient_sync(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Accumulate gradients within this context, without communication where they are whole anyway.

    Sharded weights have sharded gradients, too, which each backward adds to: without communication
    every rank would keep the whole gradient, which is what sharding is to save.
    """
    if is_sharded(module):
        yield
        return
    with accelerator.no_sync(module):
        yield


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Keep all weights gathered on every rank within this context, in compute precision.

    All ranks enter together. Within, each may run the forward, without gradients, as often as it
    likes, so evaluation may differ between ranks. Without sharding this does nothing.
    """
    units = _fsdp_modules(module) if is_sharded(module) else []
    for unit in units:
        unit.unshard()
    try:
        # The hooks would gather and free weights, and wait for ranks that do not compute.
        with without_forward_hooks(units):
            yield
    finally:
        for unit in units:
            unit.reshard()


def _fsdp_modules(module: nn.Module) -> list[Any]:
    """Return the sharded modules, the outermost first."""
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 (most of a second)

    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
