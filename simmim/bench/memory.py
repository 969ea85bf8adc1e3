"""`simmim bench memory`: what a SimMIM training step takes of a device, counted and measured.

Weights, gradients and AdamW's state are counted from the parameters. Activations come from the step
itself, run on tensors without content (`simmim.bench.step`): everything that is alive at once, the
parts that are computed again and the working set of sequential attention included.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from typing import Any, Literal

import psutil
import torch

from simmim.bench.step import Measurement, Peak, Precision, Simulation, StepCase, build_step_model
from simmim.engine.distributed.sharding import shard_size, sharding_units

Sharding = Literal["none", "fsdp2"]

GIB = 2**30
MULTIPLES = (1, 64, 128)
"""Of the batch, in the steps that tell what images add: with many of them the peak is elsewhere."""
ADAMW_STATES = 2
MEMORY_TO_LEAVE = 0.8
"""Share of the free memory that a measured step may be expected to take."""

ASSUMPTIONS = """\
weights   float32; with bf16, fsdp2 computes with bf16 weights and shards the float32 ones
gradients as the weights that are computed with; fsdp2 averages and keeps them in float32
AdamW     two states, float32
fsdp2     shares out everything; two blocks, what is outside the blocks, and the gradients of one
          block are gathered at a time
bf16-weights: weights, gradients and states are all bf16
activations: every tensor that is alive at once, in a step on tensors without content; bf16 is
          autocast where weights are whole, with its bf16 copies of them
One micro-batch a step. Gradients are none during the forward pass, and no second copy of them is
kept for their exchange. What an allocator leaves unused, and what a GPU's context and libraries
take, come on top."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How training is spread over devices."""

    sharding: Sharding
    devices: int

    def __str__(self) -> str:
        return self.sharding if self.sharding == "none" else f"{self.sharding}/{self.devices}"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the parameters of a model tell about its memory; all are numbers, not bytes."""

    parameters: int
    gathered: int
    """In the two largest blocks and in what is outside all blocks."""
    largest_unit: int
    shards: dict[int, int]
    """The largest share of one device, by number of devices."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that one device needs."""

    weights: int
    """In shards or whole, master weights too."""
    optimizer: int
    gathered: int
    """Weights and gradients that fsdp2 gathers for a moment."""
    gradients: int
    """At the peak."""
    activations: int
    """At the peak."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step, what it needs in each placement, and what it was measured to take on one device."""

    case: StepCase
    parameters: int
    activations: int
    """Bytes, when they are the most; with few images that is not when the whole need is."""
    needs: dict[str, Need]
    """By placement."""
    largest_batch: dict[str, int]
    """By placement: images a device that fit the device memory; empty where none was given."""
    measured: Measurement | None

    @property
    def ratio(self) -> float | None:
        """What was measured over what was counted."""
        if self.measured is None:
            return None
        return self.measured.peak / self.needs["none"].total


def model_size(case: StepCase, devices: Iterable[int]) -> ModelSize:
    """Count the parameters of the model of a step, which is built without content."""
    with torch.device("meta"):
        model = build_step_model(case)
    *blocks, outside = sharding_units(model)
    sizes = sorted((unit.size for unit in blocks), reverse=True)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gathered=sum(sizes[:2]) + outside.size,
        largest_unit=sizes[0],
        shards={number: shard_size(model, rank=0, world=number) for number in devices},
    )


def compute_precision(precision: Precision, sharding: Sharding) -> Precision:
    """Return what a step computes in: sharded weights of bf16 training are bf16 themselves."""
    return "bf16-weights" if precision == "bf16" and sharding != "none" else precision


def need(
    size: ModelSize,
    simulation: Simulation,
    placement: Placement,
    precision: Precision,
    *,
    optimizer: bool,
) -> Need:
    """Add up what one device needs at the peak of a step.

    Args:
        size: the model's.
        simulation: the step's activations, computed in `compute_precision`.
        placement: the devices.
        precision: of the training.
        optimizer: whether AdamW's state is there.
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
    return Need(
        weights=weights,
        optimizer=states,
        gathered=gathered,
        gradients=round(gradient * peak.gradients),
        activations=peak.activations,
    )


def worst_peak(peaks: Iterable[Peak], gradient_bytes: float) -> Peak:
    """Return the moment at which activations and gradients, of so many bytes each, are the most."""
    return max(peaks, key=lambda peak: peak.activations + gradient_bytes * peak.gradients)


def largest_batch(device_memory: int, needed: Mapping[int, int]) -> int:
    """Return how many images fit a device, by straight lines between some that were counted.

    Args:
        device_memory: bytes.
        needed: bytes that two or more numbers of images need.
    """
    points = sorted(needed.items())
    for (few, less), (many, more) in pairwise(points):
        fit = few + (device_memory - less) * (many - few) / (more - less)
        if fit < many:
            break
    return max(0, int(fit))


def run_cases(action: Literal["simulate", "measure"], cases: Sequence[StepCase]) -> Iterator[Any]:
    """Let a process of its own simulate or measure the cases; yield its answers.

    Raises:
        ValueError: it failed; its last line says why.
    """
    # Large tensors go back to the system when they are freed, so that the peak is one of tensors.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "simmim.bench.step", action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | at_once,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([asdict(case) for case in cases]))
        process.stdin.close()
        for line in process.stdout:
            values = json.loads(line)
            if action == "measure":
                yield Measurement(**values)
            else:
                yield Simulation(peaks=tuple(Peak(**peak) for peak in values["peaks"]))
        if process.wait():
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise ValueError(f"the process that was to {action} steps failed: {last}")


def make_rows(
    cases: Sequence[StepCase],
    placements: Sequence[Placement],
    *,
    device_memory: int | None,
    measure: bool,
    say: Callable[[str], None],
) -> list[Row]:
    """Return a row for each case; see `Row`.

    Args:
        cases: steps.
        placements: the first is `none` on one device.
        device_memory: bytes, for the largest batch.
        measure: take the step too, where it fits this machine.
        say: is told what takes a while.
    """
    rows = [
        count(asked, answers, placements, device_memory)
        for asked, answers in simulations(cases, placements, bool(device_memory), say)
    ]
    if not measure:
        return rows
    return [_measured(row, say) for row in rows]


def _measured(row: Row, say: Callable[[str], None]) -> Row:
    """Add a measurement, where the step fits this machine."""
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
    """Yield each case with the simulations that its row is made of.

    They are those of every precision that a placement computes in; with `many`, of all MULTIPLES of
    its batch.
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
        say(f"counting {describe(case)}")
        yield case, dict(zip(steps, islice(answers, len(steps)), strict=True))


def count(
    case: StepCase,
    found: Mapping[StepCase, Simulation],
    placements: Sequence[Placement],
    device_memory: int | None,
) -> Row:
    """Make the row of a case, without a measurement, from its simulations."""
    size = model_size(case, {placement.devices for placement in placements})

    def needs(batch: int) -> dict[str, Need]:
        return {
            str(place): need(
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
    return Row(
        case=case,
        parameters=size.parameters,
        activations=max(peak.activations for peak in found[case].peaks),
        needs=few,
        largest_batch=largest,
        measured=None,
    )


def free_memory() -> int:
    """Return the free bytes of this machine's GPU, or of its memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


def describe(case: StepCase) -> str:
    """Name a step."""
    return (
        f"{case.variant} {case.image_size}/{case.window_size}, checkpointing {case.checkpointing}"
    )
