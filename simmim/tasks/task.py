"""What a task is: the one declaration by which all commands know it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simmim.report.section import NOTHING_MORE, ReportSection

REFERENCE_BATCH = 512
"""Batch size that published learning rates are scaled to."""


@dataclass(frozen=True, kw_only=True)
class PublishedRate:
    """A learning rate from the papers (arXiv 2111.09883 and 2111.09886)."""

    variants: tuple[str, ...]
    lr: float
    """Scaled linearly to REFERENCE_BATCH images."""
    text: str
    """The rate and batch size as published."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its recipe, its stage, and what commands have to know about it.

    Each task declares one as `TASK` in its `task.py`, without importing torch, and
    `simmim.tasks.all_tasks.TASKS` lists it.
    """

    name: str
    """Value of `task` in its recipes."""
    recipe: type[Any]
    """Class of its recipes, a `simmim.tasks.recipe.TaskRecipe`."""
    load_stage: Callable[[], type[Any]]
    """Imports and returns the class of its stages, a `simmim.engine.stage.TrainingStage`."""
    fine_tunes: bool = True
    """Whether `simmim finetune` trains it, on an encoder that may be pretrained."""
    rates: tuple[PublishedRate, ...] = ()
    """Published learning rates."""
    report: ReportSection = NOTHING_MORE
    """Its part of the report of a run."""

    @property
    def head(self) -> str | None:
        """Name of the folder in a run or a native export that holds its head; None if none does."""
        name: str | None = self.recipe.HEAD
        return name

    @property
    def stage(self) -> type[Any]:
        """The class of its stages; importing it imports torch."""
        return self.load_stage()
