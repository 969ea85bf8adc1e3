"""What a recipe says of its training, whatever the stage."""

from typing import Literal

from simmim.engine.monitor.tracking import Trackers
from simmim.engine.optimizer import OptimizerSettings
from simmim.engine.schedule import ScheduleSettings
from simmim.recipe import settings


@settings
class TrainingSettings:
    """How long and how a stage is trained."""

    batch_size: int
    """Images an optimiser step, over all processes."""
    epochs: float | None = None
    """Length of training in passes over the data; either this or steps."""
    steps: int | None = None
    """Length of training in optimiser steps; either this or epochs."""
    accumulation: int = 1
    """Parts that a process cuts its share of a batch into, one forward and backward each."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser are always float32. fp16 scales the
    loss, and skips steps whose gradients overflow; it is for GPUs without bf16."""
    clip_norm: float | None = 5.0
    """Largest norm of the whole gradient; null does not clip."""
    max_nonfinite: int = 10
    """Steps in a row that are skipped for a loss or gradient that is no number before training
    ends. Skipped steps leave the weights as they are, on all ranks."""
    rank_timeout: float = 600.0
    """Seconds that a process may make no progress while others wait for it; then the job ends.
    No step, validation, checkpoint or compilation may take longer. A single process may wait so
    long for data."""
    seed: int = 0
    """Seed of the initial weights, the data order, augmentation, masks and drop path."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints. Each process keeps what it saves a second time in host memory, for
    a thread to write it from; a step waits where the one before is not written yet."""
    keep_last: int = 3
    """Checkpoints kept, the last ones."""
    keep_every: int | None = None
    """Steps between checkpoints that are kept for good; null keeps none but the last."""
    keep_best: bool = True
    """Whether the best validation's checkpoint is written and kept beside the last ones, for a
    stage whose validation has a figure that tells; best.json in the run names it."""
    ema_decay: float | None = None
    """Share of a running average of the weights that stays at a step, 0.9999 for example; it grows
    to that over the first ones. Validation and export use the average; null keeps none."""
    validate_every: int = 500
    """Steps between validations; there is one at the end too."""
    look_every: int = 500
    """Steps between pictures, for a stage that draws some; there is one at the end too."""
    trackers: Trackers = "auto"
    """Where metrics go beside metrics.jsonl: auto is TensorBoard where it is installed; or a list
    of tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio; [] is none."""
    optimizer: OptimizerSettings
    """The optimiser."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over time."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, the length of training.")
        positive: tuple[str, ...] = ("batch_size", "epochs", "steps", "accumulation", "clip_norm")
        positive += ("keep_last", "max_nonfinite", "rank_timeout")
        intervals = (
            "log_every",
            "checkpoint_every",
            "keep_every",
            "validate_every",
            "look_every",
        )
        for name in positive + intervals:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; above 0 and below 1, or null.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must fit into 64 bits.")

    def total_steps(self, samples_per_epoch: int) -> int:
        """Return the number of optimiser steps."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples_per_epoch / self.batch_size))

    def steps_to_the_end(self, step: int, cursor: int, samples_per_epoch: int) -> int:
        """Return the number of steps of a training whose first ones had another batch size.

        Args:
            step: steps taken with it.
            cursor: samples taken in them.
            samples_per_epoch: samples of an epoch.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        left = self.epochs * samples_per_epoch - cursor
        return step + max(0, round(left / self.batch_size))
