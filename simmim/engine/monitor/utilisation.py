"""Model FLOP utilisation: what a model had to compute, over what the device could have computed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

BACKWARD = 2
"""Operations of a backward pass, in forward passes: one product each for inputs and weights."""

KNOWN_PEAKS: Mapping[str, float] = MappingProxyType(
    {
        "B200": 2250e12,
        "GH200": 989e12,
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "A100": 312e12,
        "L40S": 362e12,
        "L40": 181e12,
        "L4": 121e12,
        "A40": 150e12,
        "A10": 125e12,
        "MI300X": 1307e12,
    }
)
"""Dense bfloat16 operations a second, as the makers state them; the first name that fits is it."""

SIDE = {"cpu": 512}
OTHER_SIDE = 8192
"""Side of the matrices that are multiplied to measure a device, large enough to keep it busy."""
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that one device computes."""

    flops: float
    """Floating-point operations a second."""
    source: str
    """`maker`: the figure of the data sheet; `matmul`: measured by multiplying matrices."""


def device_peak(device: torch.device, precision: str) -> Peak:
    """Return what a device computes at most: of known GPUs in bf16 the maker's figure, or measured.

    Measuring takes a fraction of a second, and tells of the moment: on a CPU that is busy with
    something else, the peak is lower and the utilisation looks higher.
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for known, flops in KNOWN_PEAKS.items():
            if known in name:
                return Peak(flops=flops, source="maker")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Peak(flops=measured_peak(device, dtype), source="matmul")


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of the fastest of a few products of square matrices."""
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
    flops_per_sample: int, samples_per_second: float, peak: Peak, *, devices: int
) -> float:
    """Return the share of what the devices could compute that the model needed.

    A training step counts as three forward passes. What checkpointing computes again does not
    count: it is the model that needs it, not the device.
    """
    needed = (1 + BACKWARD) * flops_per_sample * samples_per_second
    return needed / (peak.flops * devices)
