"""Devices of a training: the accelerator, and a stage's module and optimiser on it."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simmim.compat import forget_precision, fresh_accelerate_state
from simmim.engine.distributed.launcher import join_group
from simmim.engine.distributed.sharding import (
    shard_for_training,
    synchronise_norms,
    trains_in_shards,
)
from simmim.engine.distributed.switches import DDP_OPTIONS, switched, switches_for
from simmim.engine.distributed.watchdog import group_timeout
from simmim.engine.generators import own_generators
from simmim.engine.optimizer import build_optimizer, freeze, parameter_groups
from simmim.engine.stage import TrainingStage
from simmim.environment import fsdp_hidden, process_environment, restored_variables

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""
NEVER = 2**31 - 1
LARGEST_BLOCK = 2**30


@contextmanager
def own_process_state() -> Iterator[None]:
    """Give a run the process-wide state of a fresh process, and restore what was before.

    That is accelerate's shared state, the environment, torch's number of threads and generators,
    and on a GPU what `switched` sets: runs of different precision may follow each other in one
    process.
    """
    variables, threads = process_environment().variables, torch.get_num_threads()
    switches = switches_for("cuda" if torch.cuda.is_available() else "cpu", variables)
    try:
        with (
            fresh_accelerate_state(),
            own_generators(),
            switched(switches, variables),
            restored_variables(),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def build_accelerator(precision: str, rank_timeout: float = 600.0) -> Accelerator:
    """Build the accelerator: this machine's devices, or its CPU, and the recipe's precision.

    Raises:
        ValueError: no device supports the precision.
    """
    if not torch.accelerator.is_available():
        if precision == "fp16":
            raise ValueError(
                "training.precision fp16 needs a GPU, and this machine has none: use bf16 or fp32 "
                "on a CPU."
            )
        keep_freed_memory()
    mixed_precision = "no" if precision == "fp32" else precision
    forget_precision(mixed_precision)
    timeout = group_timeout(rank_timeout)
    join_group(timeout)
    handlers: list[KwargsHandler] = [InitProcessGroupKwargs(timeout=timeout)]
    if torch.cuda.is_available():
        as_views = DDP_OPTIONS["gradient_as_bucket_view"]
        handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=as_views))
    with fsdp_hidden():
        return Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            kwargs_handlers=handlers,
        )


def prepare(
    stage: TrainingStage, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Move a stage's module to its devices, whole or sharded, and build the optimiser.

    Returns:
        The module, wrapped for DDP if needed, and the optimiser.
    """
    settings = stage.recipe.training.optimizer
    freeze(stage.module, settings.freeze)
    stage.module.to(accelerator.device)
    synchronise_norms(stage.module, accelerator.device, accelerator.num_processes)
    sharded = trains_in_shards(accelerator)
    if sharded:
        shard_for_training(stage.module, accelerator)
    groups = parameter_groups(stage.module, settings)
    optimizer = accelerator.prepare(build_optimizer(stage.module, settings, groups))
    if sharded:
        return stage.module, optimizer
    module = accelerator.prepare(stage.module)
    if isinstance(module, DistributedDataParallel) and accelerator.device.type == "cuda":
        # They were broadcast once. The constructor's argument differs between versions of torch.
        module.broadcast_buffers = DDP_OPTIONS["broadcast_buffers"]
    return module, optimizer


class HostCopy:
    """A number of the device on its way to the host.

    Read after more work was started, it waits for its own computation and for none of that work.
    """

    def __init__(self, value: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._value = value
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def __float__(self) -> float:
        """Wait until the number is here, and return it."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)


def keep_freed_memory() -> None:
    """Let the allocator keep freed memory for its next allocations; on Linux with glibc only.

    A training step on a CPU frees all its activations and allocates them again. By default the
    system takes them back and zeroes every page again, which costs 3% to 6% of a step. Peaks do not
    change; between steps the process keeps its peak memory.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
