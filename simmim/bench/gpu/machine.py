"""The machine: what it has, and what it reaches."""

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist

from simmim.bench.gpu.cells import CheckFailed, Values
from simmim.bench.gpu.scale import Scale

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "einops",
    "safetensors",
    "accelerate",
    "timm",
    "transformers",
    "pydantic",
    "simplejpeg",
    "webdataset",
)


def find_environment(scale: Scale) -> Values:
    """Return versions, devices and compilers; what compiled blocks need has to be there."""
    device = scale.torch_device
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu cores": os.cpu_count(),
        "device": device_name(device),
        "devices": torch.cuda.device_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "c++ compiler": next((one for one in ("c++", "g++", "clang++") if shutil.which(one)), None),
        "c compiler": next((one for one in ("cc", "gcc", "clang") if shutil.which(one)), None),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }
        if importlib.util.find_spec("triton") is None:
            raise CheckFailed("Triton is missing: blocks cannot be compiled", found)
        if found["c compiler"] is None:
            raise CheckFailed("Triton needs a C compiler (gcc), and none is on the PATH", found)
    return found


def device_name(device: torch.device) -> str:
    """Return the name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.processor() or platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run(
        [program, "--query-gpu=driver_version", "--format=csv,noheader"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.partition("\n")[0] or None if done.returncode == 0 else None


def check_process_groups(scale: Scale) -> Values:
    """Make a process group of one rank with each backend, and sum over it."""
    backends = ["gloo", *(["nccl"] if scale.torch_device.type == "cuda" else [])]
    found: dict[str, Any] = {}
    for backend in backends:
        device = scale.torch_device if backend == "nccl" else torch.device("cpu")
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            dist.init_process_group(
                backend, init_method=f"file://{folder}/store", rank=0, world_size=1
            )
            try:
                ones = torch.ones(4, device=device)
                dist.all_reduce(ones)
                total = float(ones.sum())
            finally:
                dist.destroy_process_group()
        if total != 4:
            raise CheckFailed(f"{backend} summed four ones of one rank to {total}")
        found[f"{backend} seconds"] = round(time.perf_counter() - began, 2)
    return found


def measure_products(scale: Scale) -> Values:
    """Measure the FLOP/s of the product of large square matrices, of random bf16 numbers.

    Zeros would need less power, and so run at a higher clock.
    """
    side = scale.product_side
    left, right = (
        torch.randn(side, side, device=scale.device, dtype=torch.bfloat16) for _ in range(2)
    )
    spread = measure(lambda: left @ right, scale)
    return {
        "side": side,
        "flops per second": 2 * side**3 / spread["seconds"],
        **spread,
    }


def measure_copies(scale: Scale) -> Values:
    """Measure the bytes per second that copying a large tensor reads and writes."""
    source = torch.ones(scale.copied_bytes, device=scale.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    spread = measure(lambda: target.copy_(source), scale)
    return {
        "bytes": scale.copied_bytes,
        "bytes per second": 2 * scale.copied_bytes / spread["seconds"],
        **spread,
    }


def measure(run: Callable[[], object], scale: Scale) -> dict[str, Any]:
    """Return the seconds that something takes: median and quartiles of repeats.

    A repeat runs it often enough for its time to be far above that of the clock and of a launch.
    """
    for _ in range(scale.warm_up):
        run()
    single = _seconds(run, 1, scale.torch_device)
    often = max(1, min(1000, int(scale.repeat_seconds / max(single, 1e-6))))
    repeats = [_seconds(run, often, scale.torch_device) for _ in range(scale.repeats)]
    lower, median, upper = quantiles(repeats, n=4, method="inclusive")
    return {
        "seconds": median,
        "lower quartile": lower,
        "upper quartile": upper,
        "repeats": scale.repeats,
        "runs in a repeat": often,
    }


def _seconds(run: Callable[[], object], often: int, device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    for _ in range(often):
        run()
    synchronise(device)
    return (time.perf_counter() - began) / often


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
