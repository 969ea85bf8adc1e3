"""How processes share the work: whole weights in each, or shards, as accelerate was told."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from simmim.engine.checkpoint.sharded_state import is_sharded


def wants_shards() -> bool:
    """Tell whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def trains_in_shards(accelerator: Accelerator) -> bool:
    """Tell whether these processes share the weights out: they were told to, and are several."""
    return wants_shards() and accelerator.num_processes > 1


def synchronise_norms(module: nn.Module, device: torch.device, processes: int) -> None:
    """Let batch norms go by what all GPUs compute together, so that they see the whole batch.

    Names, weights and running means stay. On CPUs, for which torch has no such norms, each process
    goes on by its own part.
    """
    if processes > 1 and device.type == "cuda":
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)  # replaced within alone
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        convert(module)


def check_parallelism() -> None:
    """Check that training supports what accelerate's configuration asks for.

    Raises:
        ValueError: it asks for DeepSpeed, FSDP1, offloading or activation checkpointing.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(NO_DEEPSPEED)
    if not wants_shards():
        return
    asked = {name: os.environ.get(name, "").lower() for name in REFUSED}
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("set fsdp_version to 2 in accelerate's config: FSDP1 is not supported.")
    for name, value in asked.items():
        if value == "true":
            raise ValueError(f"set {name.lower()} to false in accelerate's config: {REFUSED[name]}")


NO_DEEPSPEED = (
    "accelerate's config asks for DeepSpeed, which is not supported: use FSDP2, with "
    "jobs/accelerate/fsdp2.yaml. In place of ZeRO-1 and ZeRO-2 set fsdp_reshard_after_forward to "
    "false in it, in place of ZeRO-3 to true."
)

REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "the recipe has execution.checkpointing for it.",
    "FSDP_OFFLOAD_PARAMS": "weights stay on the devices; more of them make the shards smaller.",
}
"""Settings of accelerate that would be dropped unseen, and what to do instead."""


def end_processes(accelerator: Accelerator) -> None:
    """Leave the group of processes; all of them call it.

    They meet first, so that none is gone while another still reads what it sent. See
    `simmim.engine.distributed.launcher.run_as_rank` for how they end.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextmanager
def without_exchange(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within, a backward adds to the gradients of this process, and nothing is exchanged."""
    if not is_sharded(module):
        with accelerator.no_sync(module):
            yield
        return
    (outermost, *_) = _units(module)
    outermost.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        outermost.set_requires_gradient_sync(True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within, each process holds all weights, in the precision they are computed in.

    All enter together, and then each may compute, without gradients, as often as it likes: what is
    evaluated need not be the same everywhere. Nothing happens where weights are whole already.
    """
    units = _units(module) if is_sharded(module) else []
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


def _units(module: nn.Module) -> list[Any]:
    """Return the units that a module was sharded in, the outermost first."""
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 (most of a second)

    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


@contextmanager
def sharding_left_to_us() -> Iterator[None]:
    """Hide FSDP from an Accelerator that is built within this context.

    Accelerate would shard in its own way: gradients averaged in bfloat16, and parameters identified
    by their address in memory, which empty shards do not have.
    """
    name = "ACCELERATE_USE_FSDP"
    asked = os.environ.pop(name, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[name] = asked
