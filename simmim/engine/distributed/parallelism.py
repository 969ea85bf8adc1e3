"""How processes share the work: whole weights in each, or shards, as accelerate was told."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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


def wants_zero() -> bool:
    """Tell whether accelerate's configuration asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def zero_stage() -> int:
    """Return the stage of ZeRO that accelerate's configuration asks for; 2 is its default."""
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def check_parallelism() -> None:
    """Refuse what accelerate's configuration asks for and is not done.

    Raises:
        ValueError: it asks for another stage of ZeRO than 1 and 2, FSDP1, offloading, or
            checkpointing of activations, or DeepSpeed is not installed.
    """
    if wants_zero():
        _check_zero()
    if not wants_shards():
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


def _check_zero() -> None:
    for device in ("OPTIMIZER", "PARAM"):
        name = f"OFFLOAD_{device}_DEVICE"
        if os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none").lower() != "none":
            raise ValueError(f"set {name.lower()} to none in accelerate's config: no offloading.")
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        raise ValueError(
            "leave deepspeed_config_file out of accelerate's config, and set zero_stage in it: all "
            "else is the recipe's."
        )
    stage = zero_stage()
    if stage not in (1, 2):
        raise ValueError(
            f"zero_stage in accelerate's config is {stage}; 1 and 2 are supported. FSDP2 shards "
            "weights too, as ZeRO 3 does: take jobs/accelerate/fsdp2.yaml."
        )
    if find_spec("deepspeed") is None:
        raise ValueError("accelerate's config asks for DeepSpeed: pip install 'simmim[zero]'")


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
    """Let an Accelerator that is built within not know of FSDP, nor of DeepSpeed.

    With DeepSpeed it would step inside the backward. With FSDP it would shard in its own way:
    gradients averaged in bfloat16, and parameters told apart by where they lie in memory, which
    those of which a process holds no row have not.
    """
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    asked = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)
