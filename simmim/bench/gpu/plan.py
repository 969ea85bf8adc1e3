"""The cells of `simmim bench gpu`, in the order in which they tell the most."""

from functools import partial

from simmim.bench.gpu import machine, selftest, training
from simmim.bench.gpu.cells import Cell
from simmim.bench.gpu.scale import Scale
from simmim.bench.gpu.selftest import PATHS, PRECISIONS


def make_plan(scale: Scale) -> list[Cell]:
    """Return all cells: what decides whether figures mean anything comes first.

    Compiling takes longest. Of the combinations that nobody trains with, those that are compiled
    come last.
    """
    return [
        Cell(name="machine/environment", run=partial(machine.find_environment, scale)),
        Cell(name="machine/process groups", run=partial(machine.check_process_groups, scale)),
        Cell(name="machine/matrix product", run=partial(machine.measure_products, scale)),
        Cell(name="machine/copy", run=partial(machine.measure_copies, scale)),
        *agreement(scale, compiled=False),
        *agreement(scale, compiled=True),
        Cell(name="selftest/steps without waiting", run=partial(selftest.check_quiet_steps, scale)),
        Cell(name="selftest/memory", run=partial(selftest.check_memory, scale)),
        Cell(name="selftest/kill and resume", run=partial(training.check_resuming, scale)),
        Cell(name="selftest/ranks", run=partial(training.check_ranks, scale), limit=400),
        Cell(name="selftest/lost rank", run=partial(training.check_lost_rank, scale), limit=300),
    ]


def agreement(scale: Scale, *, compiled: bool) -> list[Cell]:
    """Return the cells that compare attention paths with double precision."""
    mode = "compiled" if compiled else "eager"
    return [
        Cell(
            name=f"selftest/{path} {precision} {mode}",
            run=partial(selftest.check_agreement, scale, path, precision, compiled=compiled),
        )
        for path in PATHS
        for precision in PRECISIONS
    ]
