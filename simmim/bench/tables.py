"""Tables of `simmim bench memory` for a person, and the same as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from simmim.bench.memory import GIB, Placement, Row

NUMBER = 10


def memory_table(rows: Sequence[Row], placements: Sequence[Placement]) -> str:
    """Return what each step needs of a device, in GiB, a column for each placement.

    Under it stands how the measured ones were measured.
    """
    names = [str(placement) for placement in placements]
    measured = any(row.measured for row in rows)
    heads = ["params", "activ.", *names, *(["measured", "ratio", "seconds"] if measured else [])]
    case = rows[0].case
    images = "1 image" if case.batch == 1 else f"{case.batch} images"
    step = "a step" if case.optimizer else "forward and backward"
    how = f"{case.precision}, attention {case.attention}"
    lines = [f"GiB that {step} of {images} takes of a device: {how}\n", _line(_STEP_HEADS, heads)]
    for row in rows:
        cells = [f"{row.parameters / 1e6:,.0f} M", _gib(row.activations)]
        cells += [_gib(row.needs[name].total) for name in names]
        if row.measured is not None and row.ratio is not None:
            cells += [
                _gib(row.measured.peak),
                f"{row.ratio:.2f}",
                f"{row.measured.seconds:.0f}",
            ]
        lines.append(_line(_step_cells(row), cells))
    if measured:
        meters = sorted({row.measured.meter for row in rows if row.measured})
        lines.append(f"\nmeasured: {', '.join(meters)}. ratio: measured / none.")
    return "\n".join(lines)


def batch_table(rows: Sequence[Row], placements: Sequence[Placement]) -> str:
    """Return how many images a device takes at most in each placement."""
    names = [str(placement) for placement in placements]
    lines = [_line(_STEP_HEADS, names)]
    lines += [
        _line(_step_cells(row), [f"{row.largest_batch[name]:,}" for name in names]) for row in rows
    ]
    return "\n".join(lines)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain values; memory in bytes."""
    return [
        asdict(row)
        | {
            "needs": {
                name: asdict(need) | {"total": need.total} for name, need in row.needs.items()
            },
            "ratio": row.ratio,
        }
        for row in rows
    ]


_STEP_HEADS = ("variant", "size", "checkpointing")


def _step_cells(row: Row) -> tuple[str, str, str]:
    case = row.case
    return case.variant, f"{case.image_size}/{case.window_size}", str(case.checkpointing)


def _line(step: tuple[str, str, str], cells: Sequence[str]) -> str:
    left = f"{step[0]:<8}{step[1]:<9}{step[2]:<14}"
    return (left + "".join(f"{cell:>{NUMBER}}" for cell in cells)).rstrip()


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
