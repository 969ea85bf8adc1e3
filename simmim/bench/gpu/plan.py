"""The cells of `simmim bench gpu`, in the order in which they tell the most."""

from collections.abc import Iterator
from functools import partial

from simmim.bench.gpu import machine, selftest, training
from simmim.bench.gpu.attention import measure_attention
from simmim.bench.gpu.cells import Cell, Results
from simmim.bench.gpu.peers import Name
from simmim.bench.gpu.scale import Scale
from simmim.bench.gpu.selftest import PATHS
from simmim.bench.gpu.steps import measure_step
from simmim.bench.roofline.ceiling import StepSize
from swinv2.config import AttentionPath

COMPILING = 400.0
"""Seconds that a cell may take which compiles a whole encoder, block by block for peers."""
CONTESTANTS: tuple[tuple[Name, bool], ...] = (
    ("ours", True),
    ("timm", True),
    ("ours", False),
    ("timm", False),
    ("transformers", False),
    ("transformers", True),
)
"""Who takes a step, and whether it is compiled."""
FIRST_STEPS = 3
"""Sizes of steps that come before the combinations that nobody trains with."""


def make_plan(scale: Scale, results: Results) -> list[Cell]:
    """Return all cells: what decides whether figures mean anything comes first.

    Compiling takes longest. Of the combinations that nobody trains with, those that are compiled
    come late.

    Args:
        scale: sizes.
        results: outcomes, of which measurements take the measured peaks.
    """
    first, *others = _steps(scale, results)
    return [
        Cell(name="machine/environment", run=partial(machine.find_environment, scale)),
        Cell(name="machine/process groups", run=partial(machine.check_process_groups, scale)),
        Cell(name="machine/matrix product", run=partial(machine.measure_products, scale)),
        Cell(name="machine/copy", run=partial(machine.measure_copies, scale)),
        *_agreement(scale, PATHS, compiled=False),
        *_agreement(scale, ("auto",), compiled=True),
        Cell(name="selftest/steps without waiting", run=partial(selftest.check_quiet_steps, scale)),
        Cell(name="selftest/memory", run=partial(selftest.check_memory, scale), limit=COMPILING),
        *first,
        Cell(name="selftest/kill and resume", run=partial(training.check_resuming, scale)),
        Cell(name="selftest/ranks", run=partial(training.check_ranks, scale), limit=COMPILING),
        Cell(name="selftest/lost rank", run=partial(training.check_lost_rank, scale), limit=300),
        Cell(name="loader/training", run=partial(training.measure_loader, scale), limit=300),
        *_attention(scale, results, "auto"),
        *(cell for cells in others[: FIRST_STEPS - 1] for cell in cells),
        *_agreement(scale, [path for path in PATHS if path != "auto"], compiled=True),
        *(cell for path in PATHS if path != "auto" for cell in _attention(scale, results, path)),
        *(cell for cells in others[FIRST_STEPS - 1 :] for cell in cells),
    ]


def _agreement(
    scale: Scale, paths: "list[AttentionPath] | tuple[AttentionPath, ...]", *, compiled: bool
) -> Iterator[Cell]:
    """Yield the cells that compare attention paths with double precision."""
    for path in paths:
        for precision in scale.precisions:
            yield Cell(
                name=f"selftest/{path} {precision} {_mode(compiled)}",
                run=partial(selftest.check_agreement, scale, path, precision, compiled=compiled),
            )


def _attention(scale: Scale, results: Results, path: AttentionPath) -> Iterator[Cell]:
    for window in scale.windows:
        for compiled in (True, False):
            run = partial(measure_attention, scale, results, window, path, compiled=compiled)
            yield Cell(name=f"attention/{window**2} {path} {_mode(compiled)}", run=run)


def _steps(scale: Scale, results: Results) -> Iterator[list[Cell]]:
    """Yield the cells of each size of a step."""
    for size in scale.steps:
        yield [_step(scale, results, size, *contestant) for contestant in CONTESTANTS]


def _step(scale: Scale, results: Results, size: StepSize, name: Name, compiled: bool) -> Cell:
    return Cell(
        name=f"step/{size} {name} {_mode(compiled)}",
        run=partial(measure_step, scale, results, size, name, compiled=compiled),
        limit=COMPILING,
    )


def _mode(compiled: bool) -> str:
    return "compiled" if compiled else "eager"
