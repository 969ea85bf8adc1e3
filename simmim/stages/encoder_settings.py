"""The encoder of a recipe: a variant of the paper, or sizes of one's own."""

from typing import Literal

from simmim.data.images import check_channels
from simmim.recipe import settings
from swinv2 import SwinV2Config
from swinv2.config import variant_config


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
    """Channels of the images: 1 grey, 3 colour, 4 colour and transparency."""
    embed_dim: int | None = None
    """Channels of the first stage; null keeps the variant's."""
    depths: tuple[int, ...] | None = None
    """Blocks of each stage; null keeps the variant's."""
    num_heads: tuple[int, ...] | None = None
    """Attention heads of each stage; null keeps the variant's."""
    drop_path: float = 0.0
    """Largest rate of stochastic depth, reached by the last block."""

    def __post_init__(self) -> None:
        for name in ("window_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        check_channels(self.in_channels)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be 0 or more and below 1.")

    def check_channels(self, mean: tuple[float, ...]) -> None:
        """Check that images are normalised channel by channel.

        Raises:
            ValueError: `mean` has not one number a channel.
        """
        if len(mean) != self.in_channels:
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
