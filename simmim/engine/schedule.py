"""Learning-rate schedules: functions of the step, with nothing to keep and nothing to resume."""

import math
from typing import Literal

from simmim.recipe import settings


@settings
class ScheduleSettings:
    """How the learning rate runs over training."""

    kind: Literal["cosine", "multistep", "linear"] = "cosine"
    """Shape after warm-up: cosine or linear to min_lr, or multistep, by gamma at milestones."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up in epochs; not together with warmup_steps."""
    warmup_steps: int = 0
    """Length of the linear warm-up in optimiser steps; not together with warmup_epochs."""
    warmup_lr: float = 0.0
    """Learning rate at step 0 of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine and linear."""
    milestones: tuple[float, ...] = ()
    """Epochs at which multistep multiplies the learning rate by gamma."""
    gamma: float = 0.1
    """Factor at each milestone of multistep."""

    def __post_init__(self) -> None:
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("warmup_epochs and warmup_steps are both given; keep one.")
        for name in ("warmup_epochs", "warmup_steps", "warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if (self.kind == "multistep") != bool(self.milestones):
            raise ValueError("milestones belong to kind multistep, which needs at least one.")
        if list(self.milestones) != sorted({epoch for epoch in self.milestones if epoch > 0}):
            raise ValueError(
                f"milestones are {self.milestones}; they must rise, the first above 0."
            )
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}; it must be above 0 and at most 1.")


def learning_rate(
    schedule: ScheduleSettings,
    step: int,
    *,
    peak: float,
    total_steps: int,
    steps_per_epoch: float,
) -> float:
    """Return the learning rate of optimiser step `step`, counted from 0.

    The warm-up rises in a line from `warmup_lr` to `peak`. The shapes count from step 0, so that
    cosine has moved a little when the warm-up ends, as in the reference code.

    Args:
        schedule: its shape.
        step: steps taken before this one.
        peak: learning rate at the end of the warm-up.
        total_steps: steps of the whole training.
        steps_per_epoch: for lengths given in epochs; need not be whole.
    """
    warmup = schedule.warmup_steps or round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * step / warmup
    progress = min(1.0, step / total_steps)
    match schedule.kind:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
            return schedule.min_lr + (peak - schedule.min_lr) * share
        case "linear":
            return peak + (schedule.min_lr - peak) * progress
        case "multistep":
            passed = sum(step >= round(epoch * steps_per_epoch) for epoch in schedule.milestones)
            return float(peak * schedule.gamma**passed)
