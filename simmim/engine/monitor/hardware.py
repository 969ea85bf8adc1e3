"""The machine of a run: versions and devices, memory in use, and model FLOP utilisation (MFU)."""

import json
import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from data_prep.format.atomic import atomic_write_text
from simmim.engine.distributed.sharding import trains_in_shards
from simmim.engine.distributed.switches import in_force
from simmim.environment import process_environment

if TYPE_CHECKING:
    from accelerate import Accelerator

BACKWARD = 2
"""FLOPs of a backward pass, in forward passes: one product each for inputs and weights."""

KNOWN_PEAKS: Mapping[str, float] = MappingProxyType(
    {
        "B200": 2250e12,
        "GH200 120GB": 989e12,
        "GH200 144G HBM3e": 989e12,
        "GH200 480GB": 989e12,
        "H200": 989e12,
        "H200 NVL": 835e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100 80GB HBM3": 989e12,
        "A100 80GB PCIe": 312e12,
        "A100-PCIE-40GB": 312e12,
        "A100-SXM4-40GB": 312e12,
        "A100-SXM4-80GB": 312e12,
        "L40S": 362e12,
        "L40": 181e12,
        "L4": 121e12,
        "A40": 150e12,
        "A10": 125e12,
        "MI300X": 1307e12,
    }
)
"""Dense bfloat16 FLOP/s from the data sheets, by the whole name without its maker. Others are
measured: a laptop's, a workstation's or a slice (MIG) of a device has a similar name."""

MAKERS = ("NVIDIA ", "AMD Instinct ")

SIDE = {"cpu": 512}
OTHER_SIDE = 8192
"""Side of the matrices that are multiplied to measure a device, large enough to saturate it."""
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class DevicePeak:
    """Peak compute of one device."""

    flops: float
    """Floating-point operations per second."""
    source: str
    """`maker`: from the data sheet; `matmul`: measured with a matrix product."""


def device_peak(device: torch.device, precision: str) -> DevicePeak:
    """Return the peak of a device: from the data sheet for known GPUs in bf16, else measured.

    Measuring takes a fraction of a second. On a CPU that is busy with other work the measured peak
    is too low, and the utilisation looks too high.
    """
    if device.type == "cuda" and precision != "fp32":
        flops = known_peak(torch.cuda.get_device_name(device))
        if flops is not None:
            return DevicePeak(flops=flops, source="maker")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return DevicePeak(flops=measured_peak(device, dtype), source="matmul")


def known_peak(name: str) -> float | None:
    """Return the FLOP/s of a device by its name as CUDA gives it; None for an unknown one."""
    for maker in MAKERS:
        name = name.removeprefix(maker)
    return KNOWN_PEAKS.get(name)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of a few products of square matrices."""
    side = SIDE.get(device.type, OTHER_SIDE)
    matrix = torch.full((side, side), 1 / side, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(REPEATS):
        _synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return float(2 * side**3 / fastest)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def utilisation(
    flops_per_sample: int, samples_per_second: float, peak: DevicePeak, *, devices: int
) -> float:
    """Return the MFU: FLOP/s that the model requires, as a fraction of the devices' peak.

    A training step counts as three forward passes. Recomputation by activation checkpointing does
    not count, as the model does not require it.
    """
    needed = (1 + BACKWARD) * flops_per_sample * samples_per_second
    return needed / (peak.flops * devices)


@dataclass(frozen=True, kw_only=True)
class MemoryInUse:
    """Memory of this process, in bytes."""

    device_peak: int
    """Peak of allocated device memory since the previous call; 0 on a CPU."""
    host: int
    """Resident memory of the process, without its workers."""


def memory_in_use(device: torch.device) -> MemoryInUse:
    """Return the memory of this process and reset the peak of the device."""
    peak = 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return MemoryInUse(device_peak=peak, host=int(psutil.Process().memory_info().rss))


def host_peak() -> int:
    """Return the peak of this process's resident memory since it started, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def environment(accelerator: "Accelerator", peak: DevicePeak) -> dict[str, Any]:
    """Return the versions, machine and devices of a run, without host names or paths."""
    import accelerate  # noqa: PLC0415 (only its version)

    device = accelerator.device
    ddp = accelerator.num_processes > 1 and not trains_in_shards(accelerator)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device.type} {name}".strip(),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "cores": psutil.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "peak_tflops": round(peak.flops / 1e12, 2),
        "peak_from": peak.source,
        **in_force(device.type, process_environment().variables, ddp=ddp),
        "command": " ".join(["simmim", *sys.argv[1:]]),
    }


def write_environment(file: Path, accelerator: "Accelerator", peak: DevicePeak) -> None:
    """Write `environment.json`; a resumed run describes the machine it resumes on."""
    atomic_write_text(file, json.dumps(environment(accelerator, peak), indent=1) + "\n")
