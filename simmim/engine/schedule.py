"""Learning-rate schedules: stateless functions of the optimiser step.

torch's schedulers are objects with a state of their own, which would have to be saved, and moved
where a resumed training has another length.
"""

import math

from simmim.engine.settings import ScheduleSettings


def learning_rate(
    schedule: ScheduleSettings,
    step: int,
    *,
    peak: float,
    total_steps: int,
    steps_per_epoch: float,
) -> float:
    """Return the learning rate of optimiser step `step`, counted from 0.

    The warm-up is linear from `warmup_lr` to `peak`. Cosine and linear decay count from step 0, so
    they have already decayed a little when the warm-up ends, as in the reference code.

    Args:
        schedule: shape of the schedule.
        step: optimiser steps taken before this one.
        peak: learning rate at the end of the warm-up.
        total_steps: number of steps of the whole training.
        steps_per_epoch: converts lengths given in epochs; may be fractional.
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
