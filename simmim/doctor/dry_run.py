"""A dry run on every rank: data as fast as it comes, then steps that leave the weights alone."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator

from simmim.data.loader.batch import Batch
from simmim.doctor.checks import Check, problem
from simmim.engine.devices import prepare
from simmim.engine.distributed.sharding import trains_in_shards
from simmim.engine.loop import training_step
from simmim.engine.monitor.hardware import host_peak, memory_in_use
from simmim.engine.optimizer import set_learning_rate
from simmim.engine.stage import Stage

Answer = TypeVar("Answer")

MOST_BATCHES = 1000
"""Global batches that are read at most."""
MOST_STEPS = 10
REMEDIES = {
    "data": "mend or remove the shards that are named, or lower data.workers where memory ran out",
    "dry step": "where memory ran out, raise training.accumulation or set execution.checkpointing",
}
NO_RATE = 0.0
"""Learning rate of dry steps: gradients are computed and clipped, and the weights stay."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured, over all ranks."""

    first_batch: float
    """Seconds from asking for data to having some, on the slowest rank."""
    data: float
    """Images a second that the loaders hand over when nothing holds them up."""
    compute: float
    """Images a second of whole steps on data that is there."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a dry run found."""

    checks: list[Check]
    speed: Speed | None
    """None where something failed."""


class DryRunError(Exception):
    """Some rank failed; the check that tells is its argument."""


def dry_run(stage: Stage, accelerator: Accelerator, seconds: float) -> DryRun:
    """Read and compute for a while; all ranks call it together.

    Args:
        stage: what would be trained.
        accelerator: devices and processes.
        seconds: about how long to read, and again to compute.
    """
    try:
        wait, rate, batches = _on_all_ranks(
            "data", accelerator, lambda: _read(stage, accelerator, seconds)
        )
        waits, rates = gathered(accelerator, wait), gathered(accelerator, rate)
        if not trains_in_shards(accelerator):  # the whole need not fit one device
            # Alone first: where one rank fails in a common step, the others would wait for it.
            _on_all_ranks("dry step", accelerator, lambda: _step_alone(stage, accelerator, batches))
        compute, loss, norm = _on_all_ranks(
            "dry step", accelerator, lambda: _steps(stage, accelerator, batches, seconds)
        )
    except DryRunError as failed:
        return DryRun(checks=list(failed.args), speed=None)
    speed = Speed(
        first_batch=max(waits), data=sum(rates), compute=min(gathered(accelerator, compute))
    )
    return DryRun(checks=list(_told(accelerator, loss, norm)), speed=speed)


def _told(accelerator: Accelerator, loss: float, norm: float) -> Iterator[Check]:
    finite = all(map(_is_finite, [*gathered(accelerator, loss), *gathered(accelerator, norm)]))
    shards = "in shards " if trains_in_shards(accelerator) else ""
    found = (
        f"forward and backward {shards}on {accelerator.num_processes} "
        f"process{'' if accelerator.num_processes == 1 else 'es'} ({accelerator.device.type}): "
        f"loss {loss:.4f}, gradient norm {norm:.4g}"
    )
    on_device = accelerator.device.type == "cuda"
    peak = memory_in_use(accelerator.device).device_peak if on_device else host_peak()
    place = "the device" if on_device else "the machine by each process"
    found += f", {max(gathered(accelerator, peak / 2**30)):.2f} GiB of {place} at the peak"
    if finite:
        yield Check(name="dry step", verdict="ok", found=found)
    else:
        yield Check(
            name="dry step",
            verdict="problem",
            found=f"{found}: no numbers",
            change="look for images without content, or for a data.std near 0",
        )


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _on_all_ranks(name: str, accelerator: Accelerator, act: Callable[[], Answer]) -> Answer:
    """Return what `act` gives, once all ranks have it.

    Raises:
        DryRunError: some rank has not, so that none goes on alone.
    """
    try:
        answer = act()
        failed = None
    except Exception as error:  # told to all ranks, whatever it is
        failed = problem(name, error)
    ranks = [
        rank for rank, bad in enumerate(gathered(accelerator, float(failed is not None))) if bad
    ]
    if not ranks:
        return answer
    where = f"failed on rank {', '.join(map(str, ranks))} of {accelerator.num_processes}"
    said = f"{where}: {failed.found}" if failed else f"{where}; its own output tells why"
    if failed and ranks[0] == accelerator.process_index and not accelerator.is_main_process:
        sys.stderr.write(f"rank {accelerator.process_index}: {failed.found}\n")
    raise DryRunError(
        Check(name=name, verdict="problem", found=said, change=REMEDIES.get(name, ""))
    )


def gathered(accelerator: Accelerator, value: float) -> list[float]:
    """Return the value of each rank."""
    mine = torch.tensor([value], dtype=torch.float32, device=accelerator.device)
    values: list[float] = accelerator.gather(mine).tolist()
    return values


def _read(
    stage: Stage, accelerator: Accelerator, seconds: float
) -> tuple[float, float, list[Batch]]:
    """Return seconds to the first batch, this rank's images a second, and a batch's parts."""
    training = stage.recipe.training
    began = time.perf_counter()
    batches = stage.batches(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start=0,
        end=MOST_BATCHES * training.batch_size,
    )
    kept: list[Batch] = []
    images, first = 0, began
    for batch in batches:
        if not kept:
            first = time.perf_counter()
        else:
            images += len(batch)
        if len(kept) < training.accumulation:
            kept.append(batch)
        elif time.perf_counter() - first > seconds:
            break
    return first - began, images / max(time.perf_counter() - first, 1e-9), kept


def _step_alone(stage: Stage, accelerator: Accelerator, batches: list[Batch]) -> None:
    """Take a step on this rank's own module."""
    module = stage.module.to(accelerator.device)
    with accelerator.autocast():
        loss = module.train()(batches[0].to(accelerator.device))
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss of the first batch is {float(loss)}")


def _steps(
    stage: Stage, accelerator: Accelerator, batches: list[Batch], seconds: float
) -> tuple[float, float, float]:
    """Return images a second over all ranks, and loss and gradient norm of the last step."""
    training = stage.recipe.training
    module, optimizer = prepare(stage, accelerator)
    set_learning_rate(optimizer, lambda _: NO_RATE)
    module.train()

    def step() -> tuple[float, float]:
        loss, norm = training_step(accelerator, module, optimizer, batches, training.clip_norm)
        return float(loss), float(norm)

    step()  # the first one is slow: kernels are chosen, memory is taken
    taken, began = 0, time.perf_counter()
    loss = norm = 0.0
    enough = False
    while taken < MOST_STEPS and not enough:
        loss, norm = step()
        taken += 1
        # The slowest rank decides, so that all take as many.
        enough = max(gathered(accelerator, time.perf_counter() - began)) > seconds
    return taken * training.batch_size / (time.perf_counter() - began), loss, norm
