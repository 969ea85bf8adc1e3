"""Swin Transformer V2 (arXiv 2111.09883): images → tokens → features."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from swinv2.blocks import Block
from swinv2.config import (
    Pair,
    SwinV2Config,
    record_windows,
    replace_config,
    variant_config,
)
from swinv2.hierarchy import Hierarchy


class SwinV2(Hierarchy):
    """A hierarchical encoder with shifted-window attention.

    The two halves of the forward pass are apart, so that what stands between them, such as
    hiding tokens, is composition: `encoder(images)` is `encoder.encode(encoder.embed(images))`.
    Any height and width will do; they are padded where they do not divide, and what the padding
    holds never reaches a feature of an image token through attention.
    """

    def embed(self, images: Tensor) -> Tensor:
        """Turn images into tokens.

        Floating-point (batch, channels, height, width) becomes (batch, height/patch, width/patch,
        embed_dim), rounded up.

        Raises:
            ValueError: the images have another shape, number of channels, or integer values.
        """
        channels = self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this encoder takes (batch, {channels}, "
                "height, width). Another number of channels is set by in_channels"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}; make them floating point and normalise them first"
            )
        tokens: Tensor = self.patch_embed(images)
        return tokens

    def encode(self, tokens: Tensor, chances: Tensor | None = None) -> Tensor:
        """Turn the tokens of `embed` into the normalised tokens of the last stage.

        (batch, rows, columns, embed_dim) becomes (batch, rows/8, columns/8, 8·embed_dim) for four
        stages, rounded up.

        Args:
            tokens: what `embed` gave.
            chances: int32 (batch, blocks, 2), even over 0 to `swinv2.blocks.CHANCES` - 1: what
                drop_path drops in training follows from them, so that it is the same however a
                batch is cut. None draws it.

        Raises:
            ValueError: the tokens, or the chances, have another shape.
        """
        return self.stage_outputs(tokens, chances)[-1]

    def forward(self, images: Tensor, chances: Tensor | None = None) -> Tensor:
        """Embed images, then encode them."""
        return self.encode(self.embed(images), chances)

    def features(self, images: Tensor, chances: Tensor | None = None) -> list[Tensor]:
        """Give a map of each stage, for dense heads.

        Stage i gives (batch, embed_dim·2^i, height/stride, width/stride), rounded up, at
        `strides[i]`. Maps are what a stage hands on, before merging and without a norm; only the
        last is normalised: it is the result of `encode`, channels first. What drop_path drops goes
        by chances; see `encode`.
        """
        outputs = self.stage_outputs(self.embed(images), chances)
        return [tokens.permute(0, 3, 1, 2) for tokens in outputs]

    def set_input(
        self,
        image_size: int | Pair | None = None,
        window_size: int | Pair | None = None,
    ) -> None:
        """Change the nominal image size or the window size in place, keeping all weights.

        `encoder.set_input(image_size=384, window_size=24)` does to an encoder in memory what
        `load_encoder` does to a saved one. The first change records the windows trained with, which
        position offsets stay relative to (section 3.3, transfer across window resolutions); later
        ones, saving and loading keep them. Windows should grow with the images.

        Args:
            image_size: (height, width) in pixels, or None to keep it. Images of other sizes are
                taken as before: it decides nothing but what `config` says of the stages.
            window_size: (height, width) in tokens, or None to keep it. A stage of fewer tokens
                takes one window over all of it.

        Raises:
            ValueError: a size cannot work; the encoder is left as it was.
        """
        config = replace_config(
            self.config,
            image_size=self.config.image_size if image_size is None else image_size,
            window_size=self.config.window_size if window_size is None else window_size,
        )
        if config == self.config:
            return
        self.config = replace(config, pretrained_window_sizes=record_windows(self.config))
        for module in self.stages.modules():
            if isinstance(module, Block):
                module.window = self.config.window_size


def build_encoder(encoder: str | SwinV2Config, **overrides: Any) -> SwinV2:
    """Build an encoder with fresh weights, from the name of a variant or a config.

    Overrides are fields of SwinV2Config: `build_encoder("base", image_size=192, window_size=12)`.

    Raises:
        ValueError: the variant or a field is unknown, or a size cannot work.
    """
    if isinstance(encoder, str):
        return SwinV2(variant_config(encoder, **overrides))
    return SwinV2(replace_config(encoder, **overrides))
