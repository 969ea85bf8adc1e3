"""Observers of a training, which a task brings along: validation, probes and pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from simmim.disk import skip_if_unwritable
from simmim.engine.run import RunFolder

VALIDATION, PROBE, PICTURES = "validation", "probe", "reconstructions"
"""Names of observers."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an observer has found."""

    figures: Mapping[str, float] = field(default_factory=dict)
    """Figures to log, the same on every rank."""
    picture: Path | None = None
    """A picture that was drawn into the run."""
    warning: str | None = None
    """Why there are no figures though there should be."""


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Something that looks at the weights every so many steps, and after the last."""

    name: str
    """Group of its figures, or title of its pictures, in trackers."""
    activity: str
    """What it is doing, as the watchdog says it: `validating`."""
    every: int
    """Steps between two observations."""
    observe: Callable[[Accelerator, RunFolder, int], Observation]
    """Called after a step, without gradients and with the module in evaluation mode."""
    before_first_step: bool = False
    """Whether it looks at the initial weights, too."""
    main_process_only: bool = False
    """Whether only the main process looks, at something that the report shows. The report is
    written afterwards."""
    best_metric: str | None = None
    """Name of the figure that selects the best checkpoint; higher is better. None if none does."""

    def is_due(self, step: int, total: int) -> bool:
        """Return whether it is to look after `step` of `total` steps."""
        return step % self.every == 0 or step == total


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is measured during a training, apart from its loss."""

    observers: tuple[Observer, ...]
    """In the order in which they look."""
    flops_per_sample: int
    """FLOPs of the matrix products in a forward pass over one sample."""
    baselines: Callable[[], Mapping[str, float]] = dict
    """Returns losses that are reached without learning, by name, for comparison. Called only on the
    main process, once the module is on its device."""

    @property
    def best_metric(self) -> str | None:
        """Name of the figure that selects the best checkpoint; None if none does."""
        return next((one.best_metric for one in self.observers if one.best_metric), None)

    def observer(self, name: str) -> Observer | None:
        """Return the observer of this name; None if there is none."""
        return next((one for one in self.observers if one.name == name), None)


def validation(
    validate: Callable[[Accelerator], Mapping[str, float]],
    *,
    every: int,
    best_metric: str | None = None,
) -> Observer:
    """Return the observer that validates.

    Args:
        validate: returns figures on the validation data, the same on every rank; empty if none of
            it can be measured.
        every: steps between two validations.
        best_metric: name of the figure that selects the best checkpoint.
    """

    def observe(accelerator: Accelerator, _run: RunFolder, step: int) -> Observation:
        figures, warning = validate(accelerator), None
        if not figures or best_metric not in {None, *figures}:
            warning = (
                f"validation at step {step} found nothing to measure {best_metric or 'the loss'} "
                "by: all its samples are damaged or without labels."
            )
        return Observation(figures=figures, warning=warning)

    return Observer(
        name=VALIDATION,
        activity="validating",
        every=every,
        observe=observe,
        best_metric=best_metric,
    )


def probe(accuracies: Callable[[Accelerator], Mapping[str, float]], *, every: int) -> Observer:
    """Return the observer that probes frozen features, the initial ones too.

    Args:
        accuracies: returns the accuracy of classifiers on them, the same on every rank.
        every: steps between two probes.
    """
    return Observer(
        name=PROBE,
        activity="probing",
        every=every,
        observe=lambda accelerator, _run, _step: Observation(figures=accuracies(accelerator)),
        before_first_step=True,
    )


def pictures(draw: Callable[[Accelerator, RunFolder, int], Path | None], *, every: int) -> Observer:
    """Return the observer that draws pictures into the run.

    Args:
        draw: draws the picture after a step and returns its file; None if there is nothing to draw.
        every: steps between two pictures.
    """

    def observe(accelerator: Accelerator, run: RunFolder, step: int) -> Observation:
        picture = None
        with skip_if_unwritable("a picture", run.reconstructions):
            picture = draw(accelerator, run, step)
        return Observation(picture=picture)

    return Observer(
        name=PICTURES,
        activity="drawing pictures, on rank 0",
        every=every,
        observe=observe,
        main_process_only=True,
    )
