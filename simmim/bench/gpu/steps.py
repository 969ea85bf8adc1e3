"""Speed and memory of training steps: forward, backward and AdamW in bf16."""

import gc
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from simmim.bench.gpu.cells import Results, Skipped, Values
from simmim.bench.gpu.gradients import adamw, take_step
from simmim.bench.gpu.machine import measure, synchronise
from simmim.bench.gpu.peers import MASK_CELL, Name, build
from simmim.bench.gpu.scale import Scale
from simmim.bench.gpu.selftest import quiet_compiler
from simmim.bench.roofline.ceiling import Operation, Peaks, StepSize, least_seconds, share_of_peak
from simmim.bench.roofline.work import Mode, config_of, step_operations
from swinv2.flops import forward_flops

FEW = 2
"""Images of the steps from whose memory the batch is chosen, and twice as many."""


def measured_peaks(results: Results) -> Peaks | None:
    """Return the peaks that were measured here; None if they were not."""
    product, copy = (results.values(f"machine/{name}") for name in ("matrix product", "copy"))
    if product is None or copy is None:
        return None
    return Peaks(flops=product["flops per second"], bytes=copy["bytes per second"])


def measure_step(
    scale: Scale, results: Results, size: StepSize, name: Name, *, compiled: bool
) -> Values:
    """Measure a training step with the largest batch that fits.

    Raises:
        Skipped: a single image does not fit, or a peer is missing.
    """
    config = config_of(size, scale.overrides)
    device = scale.torch_device
    free_memory_of_earlier_cells(device)
    torch.manual_seed(scale.seed)
    contestant = build(name, config)
    model = contestant.model.to(device)
    optimizer = adamw(model, device)

    made: dict[int, tuple[Tensor, Tensor]] = {}

    def step(batch: int) -> Tensor:
        if batch not in made:
            made.clear()
            made[batch] = inputs(config.in_channels, config.image_size, batch, device)
        images, mask = made[batch]

        def compute_loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return contestant.compute_loss(images, mask)

        return take_step(model, optimizer, compute_loss)

    batch = find_batch(scale, step)
    with quiet_compiler():
        if compiled:
            contestant.compile(scale.backend)
        began = time.perf_counter()
        step(batch)
        synchronise(device)
        first = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spread = measure(lambda: step(batch), scale)
    found: dict[str, Any] = {
        "images per second": batch / spread["seconds"],
        "batch": batch,
        "peak memory GiB": torch.cuda.max_memory_allocated() / 2**30
        if device.type == "cuda"
        else None,
        "seconds of the first step": first,
        **spread,
    }
    peaks = measured_peaks(results)
    if peaks is not None:
        flops = forward_flops(config)
        found["share of the measured peak"] = share_of_peak(flops, batch, spread["seconds"], peaks)
        if name == "ours":
            least = least_seconds(_operations(scale, size, batch, compiled), peaks)
            found["ceiling, images per second"] = batch / least
            found["share of the ceiling"] = least / spread["seconds"]
    return found


def _operations(scale: Scale, size: StepSize, batch: int, compiled: bool) -> list[Operation]:
    """Return the operations of a step of a batch; compiled ones are the same for each image.

    Tracing takes seconds, so it is done once.
    """
    mode: Mode = "compiled" if compiled else "eager"
    with quiet_compiler():
        return _counted(tuple(sorted(scale.overrides.items())), size, batch, mode)


@lru_cache(maxsize=4)
def _counted(
    overrides: tuple[tuple[str, Any], ...], size: StepSize, batch: int, mode: Mode
) -> list[Operation]:
    return step_operations(size, batch, mode, dict(overrides))


def inputs(
    channels: int, size: tuple[int, int], batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return images of noise on the device, and masks on the host, as training has them."""
    images = torch.randn(batch, channels, *size, device=device)
    rows, columns = (side // MASK_CELL for side in size)
    hidden = torch.arange(rows * columns) < round(0.6 * rows * columns)
    mask = hidden.view(rows, columns).repeat(batch, 1, 1)
    return images, mask.pin_memory() if device.type == "cuda" else mask


def free_memory_of_earlier_cells(device: torch.device) -> None:
    """Free what earlier cells have left, such as their compiled graphs."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def find_batch(scale: Scale, step: Callable[[int], object]) -> int:
    """Return a batch that fills most of the memory: a multiple of 8, if it is not below.

    The memory of larger batches follows from that of two small ones; it is tried before it is
    returned.

    Raises:
        Skipped: a single image does not fit.
    """
    if scale.torch_device.type != "cuda":
        return scale.largest_batch
    peaks = [peak_memory(step, batch) for batch in (FEW, FEW, 2 * FEW)]  # the first adds states
    batch = 1
    if peaks[1] is not None and peaks[2] is not None:
        each = max(1, (peaks[2] - peaks[1]) // FEW)
        free, _ = torch.cuda.mem_get_info()
        room = scale.memory_share * (free + torch.cuda.memory_reserved()) - peaks[1]
        batch = min(scale.largest_batch, FEW + max(0, int(room / each)))
    while batch >= 1:
        batch = batch // 8 * 8 or batch
        if peak_memory(step, batch) is not None:
            return batch
        batch //= 2
    raise Skipped("a single image does not fit into the memory of the device")


def peak_memory(step: Callable[[int], object], batch: int) -> int | None:
    """Return the peak bytes of a step; None if it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step(batch)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()
