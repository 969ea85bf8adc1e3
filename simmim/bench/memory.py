"""`simmim bench memory`: device memory of a SimMIM training step, estimated and measured.

Weights, gradients and AdamW's state follow from the parameters. Activations come from running the
step on fake tensors (`simmim.bench.step`): everything that is alive at once, including recomputed
parts and the working set of sequential attention. Blocks are compiled if those of training are.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from typing import Any, Literal

import psutil
import torch

from data_prep.validation import adapter
from simmim.bench.choices import Precision, Sharding
from simmim.bench.step import Measurement, Peak, Simulation, StepCase, build_module
from simmim.engine.distributed.sharding import shard_size, sharding_units
from simmim.environment import process_environment

MULTIPLES = (1, 64, 128)
"""Multiples of the batch that are simulated to find the largest batch: the peak memory occurs at
another point of the step as the batch grows."""
ADAMW_STATES = 2
MEMORY_TO_LEAVE = 0.8
"""Maximum fraction of the free memory that a step may need to be measured."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How training is distributed over devices."""

    sharding: Sharding
    devices: int

    def __str__(self) -> str:
        return self.sharding if self.sharding == "none" else f"{self.sharding}/{self.devices}"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers of parameters that determine memory."""

    parameters: int
    gathered: int
    """Parameters of the two largest blocks and outside all blocks, gathered at the same time."""
    largest_unit: int
    shards: dict[int, int]
    """Largest shard of one device, by number of devices."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Estimated bytes on one device, by purpose."""

    weights: int
    """Sharded or whole, with master weights."""
    optimizer: int
    gathered: int
    """Weights and gradients that fsdp2 gathers temporarily."""
    gradients: int
    """Gradients that exist at the peak."""
    activations: int
    """Activations at the peak."""

    @property
    def total(self) -> int:
        """Total bytes at the peak."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """A step, its estimated memory in each placement, and its measured memory on one device."""

    case: StepCase
    parameters: int
    activations: int
    """Peak bytes of activations; with few images, not at the peak of the total."""
    needs: dict[str, MemoryEstimate]
    """Estimated memory by placement."""
    largest_batch: dict[str, int]
    """Largest batch per device by placement; empty without a device memory."""
    measured: Measurement | None

    @property
    def ratio(self) -> float | None:
        """Measured over estimated memory; None if one is of compiled blocks and one of eager."""
        if self.measured is None or self.measured.compiled != self.case.compiled:
            return None
        return self.measured.peak / self.needs["none"].total


def model_size(case: StepCase, devices: Iterable[int]) -> ModelSize:
    """Count the parameters of the model of a step, built on the meta device."""
    with torch.device("meta"):
        model = build_module(case).model
    *blocks, outside = sharding_units(model)
    sizes = sorted((unit.size for unit in blocks), reverse=True)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gathered=sum(sizes[:2]) + outside.size,
        largest_unit=sizes[0],
        shards={number: shard_size(model, rank=0, world=number) for number in devices},
    )


def compute_precision(precision: Precision, sharding: Sharding) -> Precision:
    """Return the precision of computing: with sharding, bf16 training has bf16 weights."""
    return "bf16-weights" if precision == "bf16" and sharding != "none" else precision


def estimate_memory(
    size: ModelSize,
    simulation: Simulation,
    placement: Placement,
    precision: Precision,
    *,
    optimizer: bool,
) -> MemoryEstimate:
    """Estimate the memory that one device needs at the peak of a step.

    Args:
        size: numbers of parameters of the model.
        simulation: activations of the step, simulated in `compute_precision`.
        placement: distribution over devices.
        precision: precision of the training.
        optimizer: whether to include AdamW's state.
    """
    computed = 2 if compute_precision(precision, placement.sharding) == "bf16-weights" else 4
    kept = 2 if precision == "bf16-weights" else 4
    whole = size.parameters
    share = size.shards[placement.devices] if placement.sharding != "none" else whole
    states = ADAMW_STATES * kept * share if optimizer else 0
    match placement.sharding:
        case "none":
            weights, gathered, gradient = kept * whole, 0, float(kept)
        case "fsdp2":
            weights = kept * share
            gathered = computed * (size.gathered + size.largest_unit)
            gradient = kept * share / whole
    peak = worst_peak(simulation.peaks, gradient)
    return MemoryEstimate(
        weights=weights,
        optimizer=states,
        gathered=gathered,
        gradients=round(gradient * peak.gradients),
        activations=peak.activations,
    )


def worst_peak(peaks: Iterable[Peak], gradient_bytes: float) -> Peak:
    """Return the peak with the most bytes of activations and gradients."""
    return max(peaks, key=lambda peak: peak.activations + gradient_bytes * peak.gradients)


def largest_batch(device_memory: int, needed: Mapping[int, int]) -> int:
    """Return the largest batch that fits a device, by linear interpolation.

    Args:
        device_memory: bytes.
        needed: bytes needed for two or more batch sizes.
    """
    points = sorted(needed.items())
    for (few, less), (many, more) in pairwise(points):
        fit = few + (device_memory - less) * (many - few) / (more - less)
        if fit < many:
            break
    return max(0, int(fit))


def run_cases(action: Literal["simulate", "measure"], cases: Sequence[StepCase]) -> Iterator[Any]:
    """Simulate or measure the cases in a separate process, and yield the results.

    Raises:
        ValueError: the process failed; the message has its last line.
    """
    answer = Simulation if action == "simulate" else Measurement
    # Return large tensors to the system when they are freed, so that the peak is of tensors.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "simmim.bench.step", action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=process_environment().without_launcher() | at_once,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([asdict(case) for case in cases]))
        process.stdin.close()
        for line in process.stdout:
            yield adapter(answer).validate_json(line)
        if process.wait():
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise ValueError(f"the process to {action} steps failed: {last}")


def make_rows(
    cases: Sequence[StepCase],
    placements: Sequence[Placement],
    *,
    device_memory: int | None,
    measure: bool,
    say: Callable[[str], None],
) -> list[MemoryRow]:
    """Return a row for each case; see `MemoryRow`.

    Args:
        cases: steps.
        placements: the first is `none` on one device.
        device_memory: bytes, for the largest batch.
        measure: also run the step if it fits this machine.
        say: called with progress messages.
    """
    rows = [
        estimate_row(asked, answers, placements, device_memory)
        for asked, answers in simulations(cases, placements, bool(device_memory), say)
    ]
    if not measure:
        return rows
    return [_measured(row, say) for row in rows]


def _measured(row: MemoryRow, say: Callable[[str], None]) -> MemoryRow:
    """Add a measurement if the step fits this machine."""
    if row.needs["none"].total > MEMORY_TO_LEAVE * free_memory():
        return row
    say(f"measuring {describe(row.case)}")
    (measurement,) = run_cases("measure", [row.case])
    return replace(row, measured=measurement)


def simulations(
    cases: Sequence[StepCase],
    placements: Sequence[Placement],
    many: bool,
    say: Callable[[str], None],
) -> Iterator[tuple[StepCase, dict[StepCase, Simulation]]]:
    """Yield each case with its simulations: in every precision of a placement and, with `many`, of
    all MULTIPLES of its batch.
    """
    asked = {
        case: [
            replace(case, precision=precision, batch=times * case.batch)
            for times in (MULTIPLES if many else (1,))
            for precision in dict.fromkeys(
                compute_precision(case.precision, place.sharding) for place in placements
            )
        ]
        for case in cases
    }
    answers = run_cases("simulate", [step for steps in asked.values() for step in steps])
    for case, steps in asked.items():
        say(f"estimating {describe(case)}")
        yield case, dict(zip(steps, islice(answers, len(steps)), strict=True))


def estimate_row(
    case: StepCase,
    found: Mapping[StepCase, Simulation],
    placements: Sequence[Placement],
    device_memory: int | None,
) -> MemoryRow:
    """Estimate the memory of a case from its simulations; nothing is measured."""
    size = model_size(case, {placement.devices for placement in placements})

    def needs(batch: int) -> dict[str, MemoryEstimate]:
        return {
            str(place): estimate_memory(
                size,
                found[
                    replace(
                        case,
                        precision=compute_precision(case.precision, place.sharding),
                        batch=batch,
                    )
                ],
                place,
                case.precision,
                optimizer=case.optimizer,
            )
            for place in placements
        }

    few = needs(case.batch)
    largest = {}
    if device_memory is not None:
        by_batch = {times * case.batch: needs(times * case.batch) for times in MULTIPLES}
        largest = {
            name: largest_batch(
                device_memory, {batch: of_batch[name].total for batch, of_batch in by_batch.items()}
            )
            for name in few
        }
    return MemoryRow(
        case=case,
        parameters=size.parameters,
        activations=max(peak.activations for peak in found[case].peaks),
        needs=few,
        largest_batch=largest,
        measured=None,
    )


def free_memory() -> int:
    """Return the free bytes of this machine's GPU or, without one, of its host memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


def describe(case: StepCase) -> str:
    """Return a step as text."""
    return (
        f"{case.variant} {case.image_size}/{case.window_size}, checkpointing {case.checkpointing}"
    )
