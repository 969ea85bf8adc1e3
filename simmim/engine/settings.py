"""Training settings of a recipe: length, batch, checkpoints, optimiser, schedule and trackers."""

from typing import Annotated, Literal

from data_prep.bounds import Amount, Bounds, Count, Fraction, Positive, Rate, Seed, Whole
from simmim.recipe import LARGEST_INTEGER, settings

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Trackers = Literal["auto"] | tuple[TrackerName, ...]


@settings
class OptimizerSettings:
    """AdamW."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the moments in 8 bits, a quarter of the memory; it needs bitsandbytes
    (pip install 'simmim[8bit]') and does not support FSDP."""
    lr: Positive
    """Peak learning rate, reached at the end of the warm-up, for the recipe's batch size: it is not
    scaled."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update for numerical stability."""
    weight_decay: Amount = 0.05
    """Decoupled weight decay. 1-D parameters, biases, position bias, logit scale and mask token are
    not decayed."""
    layer_decay: Fraction = 1.0
    """Layer-wise learning-rate decay: factor from each encoder layer to the one below; 1 is off."""
    freeze: Count | Literal["all"] | None = None
    """First stages of the encoder that are not trained, with the patch embedding and the merging
    after each; all is the whole encoder, so that the head alone is trained, to which the norms of
    the maps belong in segmentation and detection; null freezes nothing. Frozen parts have no drop
    path, and need the time and memory of inference."""

    def check_freeze(self, stages: int) -> None:
        """Check that the encoder has the stages that are not trained.

        Raises:
            ValueError: it has fewer.
        """
        if isinstance(self.freeze, int) and self.freeze > stages:
            raise ValueError(
                f"training.optimizer.freeze is {self.freeze}, and the encoder has {stages} stages: "
                f"give a number up to {stages}, or all."
            )


@settings
class ScheduleSettings:
    """Learning rate over the course of training."""

    kind: Literal["cosine", "multistep", "linear"] = "cosine"
    """Decay after the warm-up: cosine or linear to min_lr, or multistep, by gamma at milestones."""
    warmup_epochs: Amount = 0.0
    """Length of the linear warm-up in epochs; cannot be combined with warmup_steps."""
    warmup_steps: Whole = 0
    """Length of the linear warm-up in optimiser steps; cannot be combined with warmup_epochs."""
    warmup_lr: Amount = 0.0
    """Learning rate at step 0 of the warm-up."""
    min_lr: Amount = 0.0
    """Final learning rate of cosine and linear."""
    milestones: tuple[Positive, ...] = ()
    """Epochs at which multistep multiplies the learning rate by gamma."""
    gamma: Fraction = 0.1
    """Factor at each milestone of multistep."""

    def __post_init__(self) -> None:
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("warmup_epochs and warmup_steps are both given; keep one.")
        if (self.kind == "multistep") != bool(self.milestones):
            raise ValueError("milestones belong to kind multistep, which needs at least one.")
        if list(self.milestones) != sorted({*self.milestones}):
            raise ValueError(f"milestones are {self.milestones}; they must be rising.")


@settings
class TrainingSettings:
    """Length, batch, precision, intervals and optimisation of a training, for every task."""

    batch_size: Count
    """Images per optimiser step, over all processes."""
    epochs: Positive | None = None
    """Length of training in passes over the data, rounded to whole steps; either this or steps. The
    stream of samples runs on from pass to pass, so one batch may hold samples of two."""
    steps: Count | None = None
    """Length of training in optimiser steps; either this or epochs."""
    accumulation: Count = 1
    """Micro-batches per step: parts of a process's share of a batch, each with its own forward and
    backward."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser state are always float32. fp16 scales
    the loss, and skips steps whose gradients overflow; it is for GPUs without bf16. fp32 on a GPU
    multiplies matrices in TF32."""
    clip_norm: Positive | None = 5.0
    """Maximum norm of the gradient over all parameters; null disables clipping."""
    max_nonfinite: Count = 10
    """Training ends after this many steps in a row with a non-finite (NaN or Inf) loss or gradient.
    Such steps are skipped on all ranks and leave the weights as they are."""
    rank_timeout: Positive = 600.0
    """Seconds that a process may make no progress while others wait for it; then the job ends. No
    step, validation, checkpoint or compilation may take longer. A single process may wait that long
    for data."""
    seed: Seed = 0
    """Seed of the initial weights, the data order, augmentation, masks and drop path."""
    log_every: Count = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: Count = 500
    """Steps between checkpoints. Each process copies what it saves to host memory, and a thread
    writes it from there; a step waits if the previous checkpoint is not written yet."""
    keep_last: Count = 3
    """Number of most recent checkpoints to keep."""
    keep_every: Count | None = None
    """Steps between checkpoints that are kept permanently; null keeps only the most recent ones."""
    keep_best: bool = True
    """Whether to write and keep the checkpoint of the best validation, for tasks with a metric to
    select by; best.json in the run names it. The run then exports it, and not the last."""
    ema_decay: Annotated[float, Bounds(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, for example 0.9999; it rises
    to that value over the first steps. Validation and export use the average; null keeps none."""
    validate_every: Count = 500
    """Steps between validations; one follows the last step, too."""
    look_every: Count = 500
    """Steps between pictures, for tasks that draw them; one follows the last step, too."""
    trackers: Trackers = "auto"
    """Where metrics go besides metrics.jsonl: auto is TensorBoard if it is installed; or a list of
    tensorboard, wandb and mlflow, the only trackers; [] is none."""
    optimizer: OptimizerSettings
    """The optimiser."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning-rate schedule."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, the length of training.")
        if self.steps is not None:
            self._check_length(self.steps)

    def _check_length(self, steps: float) -> None:
        """Raise ValueError if a checkpoint cannot count the samples of so many steps."""
        if not steps * self.batch_size <= LARGEST_INTEGER:
            name = "steps" if self.epochs is None else "epochs"
            raise ValueError(
                f"{name} is {getattr(self, name)}; with batch_size {self.batch_size} that is more "
                "samples than fit into 64 bits. Lower it."
            )

    def total_steps(self, samples_per_epoch: int) -> int:
        """Return the number of optimiser steps of the whole training."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        steps = self.epochs * samples_per_epoch / self.batch_size
        self._check_length(steps)
        return max(1, round(steps))

    def steps_to_the_end(self, step: int, cursor: int, samples_per_epoch: int) -> int:
        """Return the total number of steps after a change of batch size.

        Args:
            step: steps taken with another batch size.
            cursor: samples consumed in them.
            samples_per_epoch: samples in one epoch.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        left = self.epochs * samples_per_epoch - cursor
        self._check_length(step + left / self.batch_size)
        return step + max(0, round(left / self.batch_size))
