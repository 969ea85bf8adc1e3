"""Sizes of the cells: those of a GPU, and tiny ones for a dry run on a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from simmim.bench.roofline.ceiling import StepSize

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
Precision = Literal["bf16", "fp16", "fp32"]


def _published_steps() -> tuple[StepSize, ...]:
    """Return the steps that are measured, those that people use most first."""
    variants = ("base", "large", "tiny", "small", "huge", "giant")
    sizes = [(name, image, window) for image, window in ((192, 12), (256, 16)) for name in variants]
    large = [("base", 1536, 48), ("large", 1536, 48)]
    return tuple(
        StepSize(variant=name, image_size=image, window_size=window)
        for name, image, window in sizes + large
    )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and repeats; the defaults are those of a GPU."""

    device: str = "cuda"
    backend: str = "inductor"
    """Backend of torch.compile."""
    seed: int = 0
    # The self-test
    encoder: Mapping[str, Any] = field(
        default_factory=lambda: {
            "image_size": 192,
            "window_size": 12,
            "embed_dim": 48,
            "depths": (2, 1),
            "num_heads": (2, 4),
        }
    )
    """Overrides of the encoder that is compared with double precision."""
    images: Mapping[str, Size] = field(
        default_factory=lambda: {"whole": (192, 192), "padded": (200, 328)}
    )
    """Height and width of its images: whole windows, and padded ones."""
    compiled_images: tuple[str, ...] = ("whole", "padded")
    """Those that compiled blocks are given."""
    precisions: tuple[Precision, ...] = get_args(Precision)
    """Those in which it is compared."""
    quiet_steps: int = 20
    """Steps in which nothing may wait for the device."""
    # Measurements
    product_side: int = 8192
    copied_bytes: int = 2**32
    warm_up: int = 3
    repeats: int = 9
    repeat_seconds: float = 0.05
    """Seconds of a repeat; at least one run."""
    windows: tuple[int, ...] = (6, 7, 8, 12, 16, 24, 32, 48)
    """Sides of the windows of attention, in tokens."""
    attention_channels: int = 256
    attention_heads: int = 8
    attention_tokens: int = 2**18
    """Most tokens of a call of attention."""
    attention_scores: int = 2**29
    """Most scores of a call of attention."""
    steps: tuple[StepSize, ...] = field(default_factory=_published_steps)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the encoders of training steps."""
    largest_batch: int = 512
    memory_share: float = 0.8
    """Share of the free memory that the batch of a step is chosen to fill."""
    training_steps: int = 400
    """Steps of the training that is killed and resumed."""
    loader_steps: int = 40
    """Steps of the training whose wait for data is measured; 0 measures none."""
    loader_batch: int = 128
    ranks: int = 2
    """Ranks of distributed training."""

    @property
    def torch_device(self) -> "torch.device":
        """The device."""
        import torch  # noqa: PLC0415 (the command itself needs no torch)

        return torch.device(self.device)


FULL = Scale()
DRY = Scale(
    device="cpu",
    backend="eager",
    encoder={
        "image_size": 16,
        "window_size": 2,
        "embed_dim": 8,
        "depths": (1,),
        "num_heads": (1,),
    },
    images={"whole": (16, 16), "padded": (18, 22)},
    compiled_images=("padded",),
    precisions=("bf16", "fp32"),
    quiet_steps=2,
    product_side=64,
    copied_bytes=2**16,
    warm_up=1,
    repeats=2,
    repeat_seconds=0.0,
    windows=(2,),
    attention_channels=16,
    attention_heads=2,
    attention_tokens=64,
    attention_scores=2**12,
    steps=(StepSize(variant="tiny", image_size=64, window_size=4),),
    overrides={"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)},
    largest_batch=2,
    training_steps=60,
    loader_steps=0,
    loader_batch=4,
    ranks=1,
)
