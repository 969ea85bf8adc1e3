"""Process-wide switches of torch that a run sets on a CUDA GPU, and sets back when it ends."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from simmim.compat import ddp_graphs, set_allocator_settings

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments"

DDP_OPTIONS: Mapping[str, bool] = MappingProxyType(
    {
        "gradient_as_bucket_view": True,  # one copy of the gradients less
        "broadcast_buffers": False,  # batch norms are synchronised, and no other buffer changes
    }
)
"""Options of DistributedDataParallel on GPUs."""

NETWORK_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Network interfaces, which only whoever runs the job can know: shown, and never set."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Settings of torch for a run on a CUDA GPU."""

    float32_matmul: str = "high"
    """Products of float32 matrices in TF32. Products of bfloat16 or float16 values stay exact."""
    cudnn_benchmark: bool = True
    """Measure the algorithms for convolutions once for each size of images, of which there are
    few."""
    optimize_ddp: bool = False
    """Whether compiled graphs are cut where DDP sends gradients. Each block has a graph of its own,
    so gradients are sent between them already."""
    allocator: str | None
    """Settings of the allocator of GPU memory: segments that grow fragment less. None leaves those
    of the environment."""


def switches_for(device: str, environment: Mapping[str, str]) -> Switches | None:
    """Return the switches to set on a type of device; None for none.

    Args:
        device: `cuda`, `cpu`, ….
        environment: environment variables, whose choice of an allocator is kept.
    """
    if device != "cuda":
        return None
    given = _given_allocator(environment)
    if EXPANDABLE in given or "backend" in given:
        return Switches(allocator=None)
    return Switches(allocator=_joined(given, expandable=True))


@contextmanager
def switched(switches: Switches | None, environment: Mapping[str, str]) -> Iterator[None]:
    """Set switches within this context; None sets none."""
    if switches is None:
        yield
        return
    matmul, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision(switches.float32_matmul)
    torch.backends.cudnn.benchmark = switches.cudnn_benchmark
    if switches.allocator is not None:
        set_allocator_settings(switches.allocator)
    try:
        with ddp_graphs(cut=switches.optimize_ddp):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.benchmark = benchmark
        if switches.allocator is not None:
            set_allocator_settings(_joined(_given_allocator(environment), expandable=False))


def in_force(device: str, environment: Mapping[str, str], *, ddp: bool) -> dict[str, Any]:
    """Return the settings of torch and of the network as they are, for the record of a run.

    Args:
        device: type of the run's devices.
        environment: environment variables.
        ddp: whether DDP exchanges gradients.
    """
    found: dict[str, Any] = {}
    switches = switches_for(device, environment)
    if switches is not None:
        found["float32_matmul"] = torch.get_float32_matmul_precision()
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        found["optimize_ddp"] = switches.optimize_ddp
        found["allocator"] = switches.allocator or _given_allocator(environment)
        if ddp:
            found |= DDP_OPTIONS
    return found | {name: environment[name] for name in NETWORK_VARIABLES if name in environment}


def _given_allocator(environment: Mapping[str, str]) -> str:
    return next((environment[name] for name in ALLOCATOR_VARIABLES if name in environment), "")


def _joined(given: str, *, expandable: bool) -> str:
    """Return all settings of the allocator: those that are not repeated would be reset."""
    return ",".join(part for part in (given, f"{EXPANDABLE}:{expandable}") if part)
