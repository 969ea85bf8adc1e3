"""Torch's global generators: seeded for a while, and given back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator within this context; those of other devices stay untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all devices
        yield


@contextmanager
def own_generators() -> Iterator[None]:
    """Restore the generators of the CPU and of all CUDA devices after this context."""
    devices = initialised_cuda_devices()
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            yield
    finally:
        if not devices:
            # Without initialising CUDA, which would forbid to fork: the seed that the caller gave
            # to all devices, or torch's default.
            torch.cuda.manual_seed_all(torch.initial_seed())


def initialised_cuda_devices() -> list[int]:
    """Return the CUDA devices that have generators: all once CUDA is initialised, before none."""
    initialised: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return list(range(torch.cuda.device_count())) if initialised else []
