"""Lines of JSON that a run logs by step; people may have edited them, and kills cut them short.

They are checked by hand: any names are legal, and of a line with wrong values the others are used.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.text import count_noun

TEXTS = {"mfu_peak"}
"""Figures that are text; all others are numbers."""

_MOST_VALUES = 10_000
"""Values of a line; more than any task has, and a report of many more would take minutes."""
_LARGEST_STEP = 2**53
_LARGEST_VALUE = 1e39
"""Above all float32 numbers; differences of such numbers stay finite."""


@dataclass(frozen=True, kw_only=True)
class LoggedLine:
    """A complete line of a file."""

    text: bytes
    """The line itself, with its line feed."""
    values: dict[str, Any]
    """Its values of any type; empty if the line is damaged."""

    @property
    def step(self) -> int | None:
        """Step of the line; None if the line is damaged."""
        step = self.values.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            return None
        return step if 0 <= step <= _LARGEST_STEP else None

    @property
    def figures(self) -> dict[str, Any]:
        """Its figures of the right type: finite numbers, and text where text belongs."""
        return {
            name: value
            for name, value in self.values.items()
            if name.isprintable() and _is_figure(name, value)
        }


def _is_figure(name: str, value: Any) -> bool:
    if name in TEXTS:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _LARGEST_VALUE and math.isfinite(value)


def read_lines(path: Path) -> Iterator[LoggedLine]:
    """Yield the complete lines of a file; none if it is missing.

    What follows the last line feed was cut short by a kill, or is being written.
    """
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, too deep, or too many digits
            values = None
        usable = isinstance(values, dict) and len(values) <= _MOST_VALUES
        yield LoggedLine(text=line + b"\n", values=values if usable else {})


def keep_lines_up_to(path: Path, step: int) -> None:
    """Remove the lines of later steps, which are trained again, and damaged ones, with a warning.

    From step 0 nothing is kept: lines of step 0 are written again, too.
    """
    if not path.is_file():
        return
    lines = list(read_lines(path))
    damaged = sum(line.step is None for line in lines)
    kept = [line.text for line in lines if line.step is not None and 0 < step >= line.step]
    atomic_write_bytes(path, b"".join(kept))
    if damaged and step:
        sys.stderr.write(
            f"WARNING: {count_noun(damaged, 'line')} of {path} cannot be read and was left out.\n"
        )
