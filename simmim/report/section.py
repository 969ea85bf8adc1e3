"""What a task adds to the report of its runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure whose latest value is shown at the top of the report."""

    key: str
    """Name of the figure in `metrics.jsonl`."""
    title: str
    form: str = "{:.2f}"
    """Format of its value."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of figures over the steps of a training."""

    title: str
    names: Mapping[str, str]
    """Names of the figures in `metrics.jsonl`, each with its name in the legend."""


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """Figures of a task that the report shows beside those of every training.

    Figures that are in no tile or chart have a chart of their own, titled by their name.
    """

    tiles: tuple[Tile, ...] = ()
    baselines: Mapping[str, str] = field(default_factory=dict)
    """Names of the baseline losses, each with its description."""
    charts: tuple[Chart, ...] = ()
    describe: Callable[[Mapping[str, Any]], str] | None = None
    """Returns a sentence on a recipe, given its values; raises ValueError, KeyError or TypeError
    if they are damaged. None for no sentence."""


NOTHING_MORE = ReportSection()
