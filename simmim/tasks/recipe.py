"""Shared parts of recipes: the encoder and its execution, fine-tuning, and their base."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from data_prep.bounds import Count, Positive, Rate, Whole
from data_prep.channels import AdaptRule
from data_prep.format.text import count_noun
from simmim.data.settings import CroppedSettings, SampleSettings
from simmim.engine.settings import TrainingSettings
from simmim.method.settings import LossSettings
from simmim.method.strategies import MaskSettings
from simmim.recipe import settings
from swinv2.config import AttentionPath, Checkpointing, Execution, SwinV2Config, variant_config
from swinv2.config_file import EncoderDescription

SCRATCH = "scratch"
"""Value of `init` for random weights."""

HEAD_FOLDER = "classifier"
"""Folder in a run or a native export with a classifier's head and class names."""

OF_VARIANT = ("embed_dim", "depths", "num_heads", "extra_norm_every", "mlp_ratio")
"""Fields of the encoder's settings that are null where the variant's value holds."""


@settings
class EncoderSettings:
    """A Swin Transformer V2 encoder."""

    variant: Literal["tiny", "small", "base", "large", "huge", "giant"] = "base"
    """Architecture from the paper; the fields below override parts of it."""
    window_size: Count | None = None
    """Side of the attention windows in tokens; clamped to the size of the stage's map. Null is that
    of the trained weights that training starts from; random weights need a number."""
    patch_size: Count = 4
    """Side of a patch in pixels."""
    in_channels: Count = 3
    """Channels of the images: 1 grey, 3 RGB, 4 RGBA; any number for arrays (.npy)."""
    adapt_channels: AdaptRule | None = None
    """Weights of the channels of data.channels that trained weights do not have by name, in
    fine-tuning (`init`) and with --init-from: each takes those of one trained channel in turn
    (repeat), their mean (average), or zeros (zero). Channels that both have keep their weights,
    their mean and std; those of others are data.mean and data.std. null refuses other channels."""
    embed_dim: Count | None = None
    """Channels of the first stage; null is the variant's."""
    depths: tuple[Count, ...] | None = None
    """Blocks of each stage; null is the variant's."""
    num_heads: tuple[Count, ...] | None = None
    """Attention heads of each stage; null is the variant's."""
    extra_norm_every: Whole | None = None
    """Blocks of a stage between extra LayerNorms, 0 for none; null is the variant's."""
    mlp_ratio: Positive | None = None
    """Hidden units of a block's MLP per channel; null is 4."""
    drop_path: Rate = 0.0
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""

    @property
    def is_custom(self) -> bool:
        """Whether it has other sizes than its variant."""
        published = variant_config(self.variant)
        return any(
            getattr(self, name) not in (None, getattr(published, name)) for name in OF_VARIANT
        )

    @property
    def architecture(self) -> str:
        """Its architecture, for a person."""
        return f"custom architecture based on {self.variant}" if self.is_custom else self.variant

    def check_channels(self, mean: tuple[float, ...] | str, *, measurable: bool = False) -> None:
        """Check the number of means against the channels, unless they are still to be measured.

        Args:
            mean: mean of each channel.
            measurable: whether the recipe may have them measured.

        Raises:
            ValueError: `mean` does not have one value per channel.
        """
        if not isinstance(mean, str) and len(mean) != self.in_channels:
            raise ValueError(
                f"encoder.in_channels is {self.in_channels}, data.mean has "
                f"{count_noun(len(mean), 'value')}; give one value per channel in data.mean and "
                f"data.std{', or set both to measured' if measurable else ''}."
            )

    def config(self, image_size: int) -> SwinV2Config:
        """Return the encoder's configuration for square images of `image_size` pixels.

        Raises:
            ValueError: the sizes do not fit together, or there is no window size.
        """
        if self.window_size is None:
            raise ValueError(
                "encoder.window_size is missing: give the side of the attention windows in tokens, "
                "such as 8."
            )
        replaced = {
            name: getattr(self, name) for name in OF_VARIANT if getattr(self, name) is not None
        }
        return variant_config(
            self.variant,
            image_size=image_size,
            window_size=self.window_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            drop_path=self.drop_path,
            **replaced,
        )


@settings
class ExecutionSettings:
    """Execution of the encoder: affects time and memory, and results only by rounding.

    A run may be resumed with different values; checkpoints and encoders are the same.
    """

    attention: AttentionPath | tuple[AttentionPath, ...] = "auto"
    """Attention implementation, one for all stages or a list with one per stage. sequential: one
    group of windows after another, which needs the least memory; sdpa: torch's fused kernels;
    explicit: all scores at once; auto: groups of windows with attention weights kept for the
    backward pass, and all scores at once if blocks are compiled."""
    checkpointing: Checkpointing | tuple[Checkpointing, ...] = "none"
    """Activation checkpointing: what the backward pass recomputes, for all stages or a list with
    one per stage: none, attention (the attention branch of each block), full (each block)."""
    scores_at_a_time: int | None = None
    """Attention scores per group of windows; null is 2**19 on a CPU, 2**21 for windows of more than
    256 tokens, and 2**27 on a GPU."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the encoder's blocks with torch.compile: a minute or more at the start, then faster
    steps; auto does on a CUDA GPU. Where they cannot be compiled, a warning says why, and they run
    eagerly. --compile is short for --execution.compile true."""

    def __post_init__(self) -> None:
        self.execution()  # raises if a choice is invalid

    def execution(self) -> Execution:
        """Return these settings as the encoder's own class, without `compile`."""
        return Execution(
            attention=self.attention,
            checkpointing=self.checkpointing,
            scores_at_a_time=self.scores_at_a_time,
        )

    def check_stages(self, stages: int) -> None:
        """Check that lists have one entry per stage of the encoder.

        Raises:
            ValueError: a list has more or fewer.
        """
        for name in ("attention", "checkpointing"):
            choices = getattr(self, name)
            if not isinstance(choices, str) and len(choices) != stages:
                raise ValueError(
                    f"execution.{name} has length {len(choices)}, and the encoder has {stages} "
                    "stages; give one value per stage, or a single one for all."
                )

    def apply(self, encoder: Any) -> None:
        """Apply these settings to an encoder.

        Raises:
            ValueError: a list does not have one entry per stage, or they are settings of SwinV2 and
                the encoder is another.
        """
        if not hasattr(encoder, "set_execution"):
            self._check_default(type(encoder).__name__)
            return
        self.check_stages(len(encoder.strides))
        encoder.set_execution(
            attention=self.attention,
            checkpointing=self.checkpointing,
            scores_at_a_time=self.scores_at_a_time,
        )
        if self.compiles:
            encoder.compile_blocks()

    def _check_default(self, encoder: str) -> None:
        """Raise ValueError if a setting asks an encoder of another class for what only SwinV2 can.

        Args:
            encoder: name of the class.
        """
        asked = [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != field.default and getattr(self, field.name) is not False
        ]
        if asked:
            raise ValueError(
                f"execution.{asked[0]} is {getattr(self, asked[0])!r}, which is for a SwinV2, and "
                f"the encoder is a {encoder}: remove it."
            )

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled on this machine."""
        if self.compile != "auto":
            return self.compile
        import torch  # noqa: PLC0415 (slow to import; recipes are read without it)

        return torch.cuda.is_available()


def check_slots(data: SampleSettings, training: TrainingSettings) -> None:
    """Check that the batch size is a multiple of the number of slots, if the recipe fixes it.

    Raises:
        ValueError: it is not.
    """
    slots = max(data.slots_of_sets, default=1)
    if training.batch_size % slots:
        raise ValueError(
            f"training.batch_size {training.batch_size} is not a multiple of data.slots {slots}; "
            "every batch takes equally from each slot. Remove data.slots, or change one of them."
        )


class TaskRecipe:
    """Base of the recipes of all tasks."""

    SAMPLES: ClassVar[str] = "images"
    """Plural noun for samples in messages."""
    VALIDATION: ClassVar[str] = "--data.validation SHARDS"
    """Options that name validation data, for messages."""
    HEAD: ClassVar[str | None] = None
    """Name of the folder in a run or a native export that holds the head; None if there is none."""
    task: str
    encoder: EncoderSettings
    data: Any
    execution: ExecutionSettings
    training: TrainingSettings

    @property
    def init_directory(self) -> str | None:
        """Path of the trained weights to start from; None for random ones."""
        return None

    @property
    def architecture_source(self) -> str | None:
        """Path of the trained weights whose architecture, mean and std are trained, if any."""
        return self.init_directory

    def starting_from(self, start: EncoderDescription) -> Self:
        """Return the recipe for weights of `--init-from`; by default it is as it is."""
        del start
        return self

    def differences_from(self, start: EncoderDescription, target: str | None) -> list[str]:
        """Return warnings of how the recipe differs from the encoder of `--init-from`.

        Args:
            start: the encoder.
            target: what its decoder predicts, as `loss.target` names it; None if it is not known.
        """
        del start, target
        return []

    @property
    def asks_for_channels(self) -> bool:
        """Whether the recipe names the channels, so that images are reordered by name."""
        return self.data.channels is not None

    @property
    def input_text(self) -> str:
        """Size of the input and of the attention windows, for a person."""
        window = self.encoder.window_size
        windows = "its windows" if window is None else f"windows of {window}"
        return f"{self.data.image_size} pixels with {windows}"

    @classmethod
    def validating_on(cls, source: str, overrides: Sequence[str]) -> list[str]:
        """Return the overrides of a recipe that validate on other data.

        Args:
            source: folder or file of the data.
            overrides: the other overrides.

        Raises:
            ValueError: more of them are needed; says which.
        """
        del overrides
        return ["--data.validation", source]

    @property
    def validation_crop(self) -> float:
        """Fraction of the short side of a picture that validation keeps, and users should."""
        return 1.0

    @property
    def mask(self) -> MaskSettings | None:
        """Masking settings of SimMIM; None for other tasks."""
        return None

    @property
    def step_for_estimate(self) -> tuple[MaskSettings, LossSettings] | None:
        """Mask and loss of a SimMIM step that needs as much memory; None if no such step does."""
        return None

    @property
    def frozen_encoder(self) -> str | None:
        """Path of an encoder that runs beside the trained one, without gradients, if any."""
        return None

    @property
    def start_note(self) -> str | None:
        """What a person should know of this training when it starts; None for nothing."""
        return None

    @property
    def probed_per_step(self) -> float:
        """Images that online probes encode, averaged over the training steps."""
        return 0.0


@settings
class FineTuningRecipe(TaskRecipe, ABC):
    """Fine-tuning of a pretrained or randomly initialised encoder."""

    task: str
    """Task of the recipe."""
    init: str = SCRATCH
    """`scratch` for random weights, an encoder directory, or the folder of a finished run, which
    exports its best checkpoint (`simmim export RUN FOLDER --last` exports the last). Trained
    weights come with their architecture (variant, patch, channels, sizes), mean and std: then only
    `window_size` and `drop_path` of `encoder` apply, which may be left out, and data.mean and
    data.std do not; the recipe in the run records what was trained."""
    like: str | None = None
    """For random weights: the encoder directory or run that they are compared with, whose
    architecture, mean and std they take; null takes those of the recipe."""
    encoder: EncoderSettings = EncoderSettings()
    """The encoder; trained weights bring theirs."""
    data: CroppedSettings
    """The training data."""
    execution: ExecutionSettings = ExecutionSettings()
    """Execution of the encoder: affects time and memory only."""
    training: TrainingSettings
    """Length, batch size, optimiser and schedule."""

    def __post_init__(self) -> None:
        check_slots(self.data, self.training)
        if self.like is not None and self.init != SCRATCH:
            raise ValueError(
                f"like is {self.like} and init {self.init}: like is for init: scratch; leave it "
                "out, trained weights have an architecture of their own."
            )
        if self.architecture_source is None:
            if self.encoder == type(self.encoder)():
                raise ValueError(
                    "there is no encoder to train: name trained weights by --init PATH (an encoder "
                    "directory or a finished run), or describe one in the section encoder of the "
                    "recipe."
                )
            self.encoder.check_channels(self.data.mean, measurable=self.data.MEASURABLE)
            config = self.encoder.config(self.data.image_size)  # raises if sizes do not fit
            self.execution.check_stages(len(config.depths))
            self.training.optimizer.check_freeze(len(config.depths))

    @property
    def init_directory(self) -> str | None:
        """Path of the trained weights to start from; None for random ones."""
        return None if self.init == SCRATCH else self.init

    @property
    def architecture_source(self) -> str | None:
        """Path of the trained weights whose architecture, mean and std are trained, if any."""
        return self.init_directory or self.like

    @classmethod
    def without_head(cls, init: str) -> dict[str, str]:
        """Return the overrides by which a training from `init` begins with a random head."""
        del init
        return {}

    @property
    @abstractmethod
    def best_metric(self) -> str:
        """Validation metric that selects the best checkpoint; higher is better."""
