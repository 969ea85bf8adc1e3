"""Memory of a training process: what it takes, and what the C library does with what it frees."""

import ctypes
import resource
import sys
from dataclasses import dataclass

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's mallopt."""
NEVER = 2**31 - 1
LARGEST_PIECE = 2**30


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next allocation; on Linux with glibc alone.

    A training step on a CPU frees all its activations and allocates them again. By default the
    system takes them back and clears every page anew, some 3% to 6% of a step. Peaks stay as they
    are; between steps the process holds what it held at the peak.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_PIECE)


@dataclass(frozen=True, kw_only=True)
class MemoryInUse:
    """Memory of this process, in bytes."""

    device_peak: int
    """The most that tensors took of the device since the last look; 0 on a CPU."""
    host: int
    """Resident memory of the process itself, without its workers."""


def memory_in_use(device: torch.device) -> MemoryInUse:
    """Return what this process takes now, and begin to watch for the next peak."""
    peak = 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return MemoryInUse(device_peak=peak, host=int(psutil.Process().memory_info().rss))


def host_peak() -> int:
    """Return the most bytes that were resident of this process since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
