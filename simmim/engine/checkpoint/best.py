"""The best checkpoint of a run, by a figure of its validation."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.format.atomic import atomic_write_text

BEST_FILE = "best.json"
"""File in the run folder that names it."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The step of the best validation so far."""

    step: int
    metric: str
    """Name of the figure."""
    value: float
    """The higher the better."""


def better(best: Best | None, figures: Mapping[str, float], metric: str) -> bool:
    """Tell whether a validation is better than the best before it.

    Args:
        best: the best before; None for none.
        figures: of the validation; empty where there was none at this step.
        metric: name of the figure that decides.
    """
    if metric not in figures:
        return False
    if best is None or best.metric != metric:
        return True
    return figures[metric] > best.value


def write_best(run: Path, best: Best | None) -> None:
    """Name the best checkpoint in the run folder; None takes the name away."""
    if best is None:
        (run / BEST_FILE).unlink(missing_ok=True)
        return
    named = {"checkpoint": f"checkpoints/step-{best.step:08d}", **asdict(best)}
    atomic_write_text(run / BEST_FILE, json.dumps(named, indent=1) + "\n")


def best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run.

    Raises:
        ValueError: the run names none.
    """
    try:
        named = json.loads((run / BEST_FILE).read_text(encoding="utf-8"))
        return run / str(named["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{run} names no best checkpoint: train with training.keep_best true and data to "
            "validate on, or leave out --best for the last one."
        ) from None
