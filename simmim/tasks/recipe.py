"""What the recipes of the tasks share: the encoder, how it is computed, and fine-tuning."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from simmim.data.settings import CroppedSettings
from simmim.engine.settings import TrainingSettings
from simmim.limits import check_least, check_rates
from simmim.method.settings import MaskSettings
from simmim.recipe import settings
from swinv2.config import AttentionPath, Checkpointing, Execution, SwinV2Config, variant_config

if TYPE_CHECKING:
    from swinv2.encoder import HierarchicalEncoder

SCRATCH = "scratch"
"""Value of `init` for random weights."""


@settings
class EncoderSettings:
    """A Swin Transformer V2 encoder."""

    variant: Literal["tiny", "small", "base", "large", "huge", "giant"] = "base"
    """Size as in the paper; the fields below replace parts of it."""
    window_size: int
    """Side of the attention windows in tokens; clamped where a stage has fewer."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    in_channels: int = 3
    """Channels of the images: 1 grey, 3 colour, 4 colour and transparency; of arrays (.npy), any
    number."""
    embed_dim: int | None = None
    """Channels of the first stage; null keeps the variant's."""
    depths: tuple[int, ...] | None = None
    """Blocks of each stage; null keeps the variant's."""
    num_heads: tuple[int, ...] | None = None
    """Attention heads of each stage; null keeps the variant's."""
    drop_path: float = 0.0
    """Largest rate of stochastic depth, reached by the last block."""

    def __post_init__(self) -> None:
        check_least(self, 1, "window_size", "patch_size", "in_channels")
        check_rates(self, "drop_path")

    def check_channels(self, mean: tuple[float, ...] | str) -> None:
        """Check that images are normalised channel by channel, once the numbers are there.

        Raises:
            ValueError: `mean` has not one number a channel.
        """
        if not isinstance(mean, str) and len(mean) != self.in_channels:
            raise ValueError(
                f"data.mean has {len(mean)} numbers, encoder.in_channels is {self.in_channels}; "
                "give one for each channel."
            )

    def config(self, image_size: int) -> SwinV2Config:
        """Return the encoder's configuration for square images of `image_size` pixels.

        Raises:
            ValueError: the sizes cannot work together.
        """
        replaced = {
            name: getattr(self, name)
            for name in ("embed_dim", "depths", "num_heads")
            if getattr(self, name) is not None
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
    """How the encoder computes what it computes: time and memory change, results only by rounding.

    A run may be resumed with others, and its checkpoints and encoders are the same.
    """

    attention: AttentionPath | tuple[AttentionPath, ...] = "auto"
    """Path of attention, one for all stages or a list with one for each. sequential: the scores of
    one group of windows after the other, which takes the least memory; sdpa: torch's fused kernels;
    explicit: all scores at once; auto: groups too, with attention weights kept for the backward,
    and all at once where blocks are compiled."""
    checkpointing: Checkpointing | tuple[Checkpointing, ...] = "none"
    """What is computed again in the backward instead of kept, for all stages or a list with one for
    each: none, attention (the attention branch of each block), full (each block)."""
    scores_at_a_time: int | None = None
    """Attention scores that are computed together; null for 2**19 on a CPU, 2**21 in windows of
    more than 256 tokens, and 2**27 on a GPU."""
    compile: bool = False
    """Compile the encoder's blocks with torch.compile: minutes at the start, faster steps after.
    --compile is short for --execution.compile true."""

    def __post_init__(self) -> None:
        self.execution()  # raises where a choice cannot work

    def execution(self) -> Execution:
        """Return the part of these settings that the encoder itself knows."""
        return Execution(
            attention=self.attention,
            checkpointing=self.checkpointing,
            scores_at_a_time=self.scores_at_a_time,
        )

    def check_stages(self, stages: int) -> None:
        """Check that a list has one choice for each of the encoder's stages.

        Raises:
            ValueError: it has more or fewer.
        """
        for name in ("attention", "checkpointing"):
            choices = getattr(self, name)
            if not isinstance(choices, str) and len(choices) != stages:
                raise ValueError(
                    f"execution.{name} is a list of {len(choices)}, and the encoder has {stages} "
                    "stages; give one for each, or a single one for all."
                )

    def apply(self, encoder: "HierarchicalEncoder") -> None:
        """Let `encoder` compute in this way.

        Raises:
            ValueError: a list has not one choice for each of its stages.
        """
        self.check_stages(len(encoder.stages))
        encoder.set_execution(
            attention=self.attention,
            checkpointing=self.checkpointing,
            scores_at_a_time=self.scores_at_a_time,
        )
        if self.compile:
            encoder.compile_blocks()


def check_slots(slots: int, training: TrainingSettings) -> None:
    """Check that a batch can take equally from each of so many slots.

    Raises:
        ValueError: it cannot.
    """
    if training.batch_size % slots:
        raise ValueError(
            f"training.batch_size {training.batch_size} is no multiple of data.slots "
            f"{slots}; every batch takes equally from each slot. Change either."
        )


class TaskRecipe:
    """What the recipes of all tasks have in common."""

    SAMPLES: ClassVar[str] = "images"
    """What samples are called."""
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
    def input_text(self) -> str:
        """Size of the input and of the attention windows, for a person."""
        return f"{self.data.image_size} pixels with windows of {self.encoder.window_size}"

    @property
    def mask(self) -> MaskSettings | None:
        """Masking settings of SimMIM; None for other tasks."""
        return None

    @property
    def counted_mask_cell(self) -> int | None:
        """Mask cell of a SimMIM step that needs as much memory; None if no such step does."""
        return None

    @property
    def probed_per_step(self) -> float:
        """Images that online probes encode, averaged over the training steps."""
        return 0.0


@settings
class FineTuningRecipe(TaskRecipe):
    """A pretrained encoder, or fresh weights, trained for a task."""

    task: str
    """What this recipe does."""
    init: str = SCRATCH
    """`scratch`, or what to start from: an encoder directory, or the folder of a run that has
    ended. It brings its architecture (variant, patch, channels, sizes) and its mean and std: of
    `encoder` only `window_size` and `drop_path` then apply, and data.mean and data.std do not."""
    encoder: EncoderSettings
    """The encoder."""
    data: CroppedSettings
    """What is trained on."""
    execution: ExecutionSettings = ExecutionSettings()
    """How the encoder is computed."""
    training: TrainingSettings
    """The training."""

    def __post_init__(self) -> None:
        check_slots(self.data.slots, self.training)
        if self.init == SCRATCH:
            self.encoder.check_channels(self.data.mean)
            config = self.encoder.config(self.data.image_size)  # raises where sizes cannot work
            self.execution.check_stages(len(config.depths))

    @property
    def init_directory(self) -> str | None:
        """Path of the trained weights to start from; None for random ones."""
        return None if self.init == SCRATCH else self.init

    @property
    def best_metric(self) -> str:
        """The figure of validation that tells the best checkpoint; higher is better."""
        raise NotImplementedError
