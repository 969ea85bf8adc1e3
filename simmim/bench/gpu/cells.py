"""Cells of a benchmark: each has a name and a function; outcomes are kept in one JSON file.

The file is written before and after every cell, so that a kill loses one cell. Imports no torch.
"""

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.format.atomic import atomic_write_text

Values = Mapping[str, Any]
"""What a cell found: JSON values by name."""
Status = Literal["passed", "failed", "skipped", "running"]

ATTEMPTS = 2
"""How often a cell is begun: one that was running whenever the command ended is given up."""
FORMAT = 1


class Skipped(Exception):  # noqa: N818 (nothing is wrong)
    """A cell cannot run on this machine; the message says what is missing."""


class CheckFailed(ValueError):  # noqa: N818 (of the machine or of us, not of the input)
    """A check of the self-test found something wrong.

    Args:
        message: what is wrong.
        values: what was found.
    """

    def __init__(self, message: str, values: Values | None = None) -> None:
        super().__init__(message)
        self.values = values or {}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A check or a measurement."""

    name: str
    """Unique name: words separated by slashes, the first of which is the section."""
    run: Callable[[], Values]
    """Raises CheckFailed or any other exception on a failure, Skipped if it cannot run here."""
    limit: float = 150.0
    """Seconds after which it is ended as failed."""


class Results:
    """Outcomes of cells, in a JSON file."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document

    @classmethod
    def begin(cls, path: Path, settings: Values) -> "Results":
        """Begin a new file."""
        results = cls(path, {"format": FORMAT, "settings": dict(settings), "cells": {}})
        results.write()
        return results

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file; it is checked by hand, as a declaration of its outcomes would be longer.

        Raises:
            ValueError: it is not one of this command.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            document = None
        parts = ("format", "settings", "cells")
        if not isinstance(document, dict) or (*document,) != parts or document["format"] != FORMAT:
            raise ValueError(
                f"{path} is not a file of results of simmim bench gpu: give its results.json."
            )
        return cls(path, document)

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Outcomes by the name of the cell: status, seconds, values, message."""
        cells: dict[str, dict[str, Any]] = self.document["cells"]
        return cells

    @property
    def running(self) -> str | None:
        """Name of the cell that is running, or was when the command ended."""
        return next((name for name, one in self.cells.items() if one["status"] == "running"), None)

    def count_done(self) -> int:
        """Return how many cells have an outcome."""
        return sum(one["status"] != "running" for one in self.cells.values())

    def values(self, name: str) -> Values | None:
        """Return what a cell found; None if it has not passed."""
        outcome = self.cells.get(name, {})
        return outcome["values"] if outcome.get("status") == "passed" else None

    def write(self) -> None:
        """Write the file, atomically."""
        atomic_write_text(self.path, json.dumps(self.document, indent=1) + "\n")

    def start(self, cell: Cell) -> bool:
        """Note that a cell is running; return False if it is done, or given up here."""
        before = self.cells.get(cell.name, {})
        if before.get("status", "running") != "running":
            return False
        attempts = before.get("attempts", 0)
        if attempts >= ATTEMPTS:
            self.finish(cell.name, "failed", message=f"the command ended {attempts} times in it")
            return False
        self.cells[cell.name] = {
            "status": "running",
            "attempts": attempts + 1,
            "began": time.time(),
            "limit": cell.limit,
        }
        self.write()
        return True

    def finish(
        self, name: str, status: Status, *, values: Values | None = None, message: str = ""
    ) -> None:
        """Note the outcome of a cell."""
        began = self.cells.get(name, {}).get("began")
        seconds = 0.0 if began is None else round(time.time() - began, 2)
        self.cells[name] = {"status": status, "seconds": seconds, "values": dict(values or {})}
        if message:
            self.cells[name]["message"] = message
        self.write()

    def postpone(self, name: str) -> None:
        """Forget that a cell was begun, so that it is run next time."""
        del self.cells[name]
        self.write()


def run_cells(
    cells: Sequence[Cell],
    results: Results,
    *,
    deadline: float,
    is_usable: Callable[[], bool] = lambda: True,
) -> bool:
    """Run the cells that are not done, in their order; a failure is recorded as such.

    Args:
        cells: the plan.
        results: what is done, and where outcomes go.
        deadline: time (of `time.time`) after which no cell is begun.
        is_usable: tells after a failure whether this process can go on.

    Returns:
        Whether this process can go on: False after an error that spoils all later ones.
    """
    for cell in cells:
        if time.time() >= deadline:
            break
        if not results.start(cell):
            continue
        try:
            values = cell.run()
        except Skipped as reason:
            results.finish(cell.name, "skipped", message=str(reason))
        except Exception as error:  # whatever it is, the others still run
            found = error.values if isinstance(error, CheckFailed) else {}
            results.finish(cell.name, "failed", values=found, message=describe(error))
            if not is_usable():
                return False
        else:
            results.finish(cell.name, "passed", values=values)
    return True


def describe(error: Exception) -> str:
    """Return what an error says, and where it was raised unless a check raised it."""
    lines = str(error).strip().splitlines() or [""]
    text = "\n".join(lines[:20])
    if isinstance(error, CheckFailed):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
