"""Swin Transformer V2 (arXiv 2111.09883): images → tokens → features."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from swinv2.blocks import Block, PatchEmbed, PatchMerging, Stage
from swinv2.config import (
    Execution,
    SwinV2Config,
    record_windows,
    replace_config,
    variant_config,
)
from swinv2.field_values import Pair
from swinv2.flops import forward_flops
from swinv2.kernels.precision import LayerNorm, autocast_dtype

TrainedT = TypeVar("TrainedT", bound="HierarchicalEncoder")


class HierarchicalEncoder(nn.Module):
    """Patch embedding, stages of blocks and patch merging: the base of image and video encoders.

    The axes of a token map are those of `config.map_window`; merging halves rows and columns only.
    """

    CONFIG: ClassVar[type[SwinV2Config]] = SwinV2Config
    """Type of its config: an encoder of images takes no config of clips, and vice versa."""

    def __init__(self, config: SwinV2Config) -> None:
        super().__init__()
        if type(config) is not self.CONFIG:
            raise TypeError(
                f"config is a {type(config).__name__}; give a {self.CONFIG.__name__}, or use "
                "build_encoder for images and inflate for clips."
            )
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.patch_channels, config.embed_dim)
        self.stages = nn.ModuleList(_build_stages(config))
        self.merges = nn.ModuleList(PatchMerging(dim) for dim in config.stage_dims[:-1])
        self.norm = LayerNorm(config.num_features)
        self.execution = Execution()
        self.frozen: int | Literal["all"] = 0
        _initialise(self)

    @property
    def image_size(self) -> Pair:
        """Nominal height and width in pixels."""
        return self.config.image_size

    @property
    def in_channels(self) -> int:
        """Channels of an image or a frame."""
        return self.config.in_channels

    @property
    def patch_size(self) -> int:
        """Side of the patch behind each token of `embed`, in pixels."""
        return self.config.patch_size

    @property
    def embed_dim(self) -> int:
        """Channels of the tokens of `embed`."""
        return self.config.embed_dim

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.config.num_features

    @property
    def map_axes(self) -> tuple[str, ...]:
        """Axes of a token map: rows and columns, of clips also frames."""
        return ("frames", "rows", "columns")[-len(self.config.map_window) :]

    @property
    def drop_path(self) -> float:
        """Stochastic depth rate of the last block."""
        return self.config.drop_path

    @property
    def forward_flops(self) -> int:
        """FLOPs of encoding one input of the nominal size; see `swinv2.flops`."""
        return forward_flops(self.config)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all stages, in order."""
        return tuple(
            block for stage in self.stages for block in stage.modules() if isinstance(block, Block)
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens of each stage."""
        return self.config.strides

    @property
    def no_weight_decay(self) -> tuple[str, ...]:
        """Components of the names of parameters that never decay, whatever their shape."""
        return ("position_bias", "logit_scale")

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise learning rates: the embedding, the blocks, and what follows."""
        return sum(self.config.depths) + 2

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter, for layer-wise learning rates: 0 to num_layers - 1.

        The patch embedding is layer 0, blocks are counted from 1 over all stages, a patch merging
        belongs to the last block before it, an extra norm to the block before it, and the final
        norm to the last layer. The numbering follows the SimMIM code.

        Args:
            name: dotted name in this module.

        Raises:
            ValueError: the encoder has no such parameter.
        """
        depths = self.config.depths
        match name.split("."):
            case ["patch_embed", *_]:
                return 0
            case ["stages", stage, "blocks", block, *_]:
                return sum(depths[: int(stage)]) + int(block) + 1
            case ["stages", stage, "extra_norms", index, *_]:
                follows = self.config.extra_norm_every * (int(index) + 1)
                return sum(depths[: int(stage)]) + follows
            case ["merges", stage, *_]:
                return sum(depths[: int(stage) + 1])
            case ["norm", *_]:
                return self.num_layers - 1
            case _:
                raise ValueError(f"{type(self).__name__} has no parameter {name}: it has no layer.")

    def freeze(self, stages: int | Literal["all"]) -> None:
        """Exclude the first stages from training, with patch embedding and the merging after each.

        Frozen parts are always in evaluation mode, without drop path, and compute no gradients,
        neither of their weights nor of their input. 0 trains everything again.

        Args:
            stages: number of stages, or `all` for the whole encoder with its final norm.

        Raises:
            ValueError: the encoder has fewer stages.
        """
        if stages != "all" and not 0 <= stages <= len(self.stages):
            raise ValueError(
                f"freeze is {stages}, and the encoder has {len(self.stages)} stages: give a number "
                f"from 0 to {len(self.stages)}, or all."
            )
        self.frozen = stages
        self.requires_grad_()
        for module in self._frozen_modules():
            module.requires_grad_(requires_grad=False)
        self.train(self.training)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen == "all":
            return list(self.children())
        if not self.frozen:
            return []
        return [self.patch_embed, *self.stages[: self.frozen], *self.merges[: self.frozen]]

    def train(self: TrainedT, mode: bool = True) -> TrainedT:
        """Set the mode of all but frozen parts, which stay in evaluation mode."""
        super().train(mode and self.frozen != "all")
        for module in self._frozen_modules():
            module.eval()
        return self

    def _gradients(self, stage: int) -> AbstractContextManager[object]:
        """Return a context in which a stage builds no graph if it is frozen."""
        frozen = self.frozen == "all" or stage < self.frozen
        return torch.no_grad() if frozen else nullcontext()

    def stage_outputs(self, tokens: Tensor, drop_path_noise: Tensor | None) -> list[Tensor]:
        """Return the output of each stage, (batch, *map, channels); the last is normalised.

        Args:
            tokens: input of the first stage.
            drop_path_noise: see `SwinV2.encode`.

        Raises:
            ValueError: the tokens or the noise have a wrong shape or type.
        """
        axes = self.map_axes
        check_pixels("tokens", tokens)
        wrong = tokens.ndim != 2 + len(axes) or tokens.shape[-1] != self.config.embed_dim
        if wrong or not tokens.shape[1:].numel():
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; encode takes the output of embed, "
                f"(batch, {', '.join(axes)}, {self.config.embed_dim})."
            )
        depths = list(self.config.depths)
        tokens = self.in_weight_precision(tokens)
        noise: list[Any] | tuple[Tensor, ...] = [None] * len(depths)
        if drop_path_noise is not None:
            noise_shape = (len(tokens), sum(depths), 2)
            if tuple(drop_path_noise.shape) != noise_shape:
                raise ValueError(
                    f"drop_path_noise has shape {tuple(drop_path_noise.shape)}; it needs two "
                    f"numbers per sample and block, {noise_shape}."
                )
            noise = torch.split(drop_path_noise, depths, dim=1)
        outputs: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            if index:
                with self._gradients(index - 1):
                    tokens = self.merges[index - 1](outputs[-1])
            if tokens.shape[0]:  # blocks keep the shape, and have nothing to do in an empty batch
                with self._gradients(index):
                    tokens = stage(tokens, noise[index])
            outputs.append(tokens)
        with self._gradients(len(self.stages)):
            outputs[-1] = self.norm(outputs[-1])
        return outputs

    def in_weight_precision(self, pixels: Tensor) -> Tensor:
        """Return pixels or tokens in the precision of the weights, unless autocast casts them."""
        weight = self.patch_embed.projection.weight
        autocast = autocast_dtype(pixels.device) is not None
        # Autocast leaves float64 as it is; sharded weights are gathered in their own precision.
        converts = autocast and pixels.dtype != torch.float64
        if pixels.dtype == weight.dtype or converts or type(weight) is not nn.Parameter:
            return pixels
        return pixels.to(weight.dtype)

    def set_execution(self, **changes: Any) -> None:
        """Change fields of `Execution` by name: they affect time and memory, not the function.

        For very large inputs `set_execution(attention=("sequential", "sequential", "auto", "auto"),
        checkpointing="full")` trades time for memory.

        Raises:
            ValueError: a choice is unknown, or their number differs from the number of stages.
            TypeError: a field is unknown.
        """
        execution = replace(self.execution, **changes)
        choices = execution.by_stage(len(self.stages))
        self.execution = execution
        for stage, choice in zip(self.stages, choices, strict=True):
            for block in stage.modules():
                if isinstance(block, Block):
                    block.set_execution(choice)

    def compile_blocks(self, **options: Any) -> None:
        """Compile the computation of every block, in a time that does not grow with depth.

        Each stage has one graph for its plain and one for its shifted blocks, in training and in
        evaluation. Weights and their names are unchanged. `options` go to torch.compile.
        """
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.compile_blocks(**options)


class SwinV2(HierarchicalEncoder):
    """A hierarchical encoder with shifted-window attention.

    The forward pass has two halves, so that a step between them, such as masking tokens, is
    composition: `encoder(images)` is `encoder.encode(encoder.embed(images))`. Any height and width
    will do: maps are padded to whole patches and windows, and attention masks the padding of
    windows.
    """

    def embed(self, images: Tensor) -> Tensor:
        """Turn images into tokens.

        Floating-point (batch, channels, height, width) becomes (batch, height/patch, width/patch,
        embed_dim), rounded up.

        Raises:
            ValueError: the images have a wrong shape or number of channels, are integers, or are no
                tensor.
        """
        channels = self.config.in_channels
        check_pixels("images", images)
        if images.ndim != 4 or images.shape[1] != channels or not images.shape[2:].numel():
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this encoder takes (batch, {channels}, "
                "height, width). For another number of channels set in_channels."
            )
        tokens: Tensor = self.patch_embed(self.in_weight_precision(images))
        return tokens

    def encode(self, tokens: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Turn the tokens of `embed` into the normalised tokens of the last stage.

        (batch, rows, columns, embed_dim) becomes (batch, rows/8, columns/8, 8·embed_dim) for four
        stages, rounded up.

        Args:
            tokens: output of `embed`.
            drop_path_noise: int32 (batch, blocks, 2), uniform in [0, `swinv2.blocks.NOISE_RANGE`):
                decides which residual branches stochastic depth drops in training, so that the
                result does not depend on how samples are batched. None draws it.

        Raises:
            ValueError: the tokens or the noise have a wrong shape.
        """
        return self.stage_outputs(tokens, drop_path_noise)[-1]

    def forward(self, images: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Embed images, then encode them."""
        return self.encode(self.embed(images), drop_path_noise)

    def features(self, images: Tensor, drop_path_noise: Tensor | None = None) -> list[Tensor]:
        """Return a map of each stage, for dense heads.

        Stage i gives (batch, embed_dim·2^i, height/stride, width/stride), rounded up, at
        `strides[i]`. Maps are the outputs of the stages, before merging and without a norm; only
        the last is normalised: it is the result of `encode`, channels first. For `drop_path_noise`
        see `encode`.
        """
        outputs = self.stage_outputs(self.embed(images), drop_path_noise)
        return [tokens.permute(0, 3, 1, 2) for tokens in outputs]

    def set_input(
        self,
        image_size: int | Pair | None = None,
        window_size: int | Pair | None = None,
    ) -> None:
        """Change the nominal image size or the window size in place, keeping all weights.

        `encoder.set_input(image_size=384, window_size=24)` does to an encoder in memory what
        `load_encoder` does to a saved one. The first change records the windows of the training,
        which position offsets stay relative to (section 3.3, transfer across window resolutions);
        later changes, saving and loading keep them. Windows should grow with the images.

        Args:
            image_size: (height, width) in pixels, or None to keep it. Images of other sizes are
                accepted as before: only what `config` says of the stages depends on it.
            window_size: (height, width) in tokens, or None to keep it. A stage of fewer tokens
                takes one window over all of it.

        Raises:
            ValueError: a size cannot work; the encoder is unchanged.
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


def check_pixels(name: str, pixels: object) -> None:
    """Check that `pixels` is a tensor of floating-point numbers.

    Args:
        name: what they are, for the message.
        pixels: argument of `embed`.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(pixels, Tensor):
        raise ValueError(
            f"{name} are a {type(pixels).__module__}.{type(pixels).__name__}; give a tensor: "
            "torch.from_numpy converts an array, torch.stack a list of tensors."
        )
    if not pixels.is_floating_point():
        raise ValueError(
            f"{name} are {pixels.dtype}; convert them to floating point"
            f"{'' if name == 'tokens' else ' and normalise them'} first."
        )


def build_encoder(encoder: str | SwinV2Config, **overrides: Any) -> SwinV2:
    """Build an encoder with fresh weights, from the name of a variant or a config.

    Overrides are fields of SwinV2Config: `build_encoder("base", image_size=192, window_size=12)`.

    Raises:
        ValueError: the variant or a field is unknown, or a size cannot work.
    """
    if isinstance(encoder, str):
        return SwinV2(variant_config(encoder, **overrides))
    if not isinstance(encoder, SwinV2Config):
        raise TypeError(
            f"encoder is a {type(encoder).__name__}; give the name of a variant or a SwinV2Config."
        )
    return SwinV2(replace_config(encoder, **overrides))


def _build_stages(config: SwinV2Config) -> list[Stage]:
    """Build the stages; every second block of each is shifted, and drop path rises linearly."""
    rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
    references = config.reference_windows
    stages = []
    for index, (dim, depth) in enumerate(zip(config.stage_dims, config.depths, strict=True)):
        blocks = [
            Block(
                dim,
                config.num_heads[index],
                window=config.map_window,
                shifted=position % 2 == 1,
                reference_window=references[index],
                mlp_ratio=config.mlp_ratio,
                drop_path=rates[sum(config.depths[:index]) + position],
            )
            for position in range(depth)
        ]
        stages.append(Stage(blocks, dim, config.extra_norm_every))
    return stages


def _initialise(encoder: nn.Module) -> None:
    """Draw fresh weights as the reference code does; each block starts as the identity."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in encoder.modules():
        if isinstance(module, Block):
            for norm in (module.norm1, module.norm2):
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)
