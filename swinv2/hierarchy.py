"""What encoders of images and of clips share: stages over a map of tokens, and how they compute."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from swinv2.blocks import Block, PatchEmbed, PatchMerging, Stage
from swinv2.config import Execution, SwinV2Config


class Hierarchy(nn.Module):
    """Patch embedding, stages of blocks, and mergings between them, over a map of any axes.

    The axes of the map are those of `config.map_window`; merging joins rows and columns alone.
    """

    def __init__(self, config: SwinV2Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.patch_channels, config.embed_dim)
        self.stages = nn.ModuleList(build_stages(config))
        self.merges = nn.ModuleList(PatchMerging(dim) for dim in config.stage_dims[:-1])
        self.norm = nn.LayerNorm(config.num_features)
        self.execution = Execution()
        initialise(self)

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.config.num_features

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens of each stage."""
        return self.config.strides

    def stage_outputs(self, tokens: Tensor, chances: Tensor | None) -> list[Tensor]:
        """Give what each stage hands on, (batch, *map, channels); the last is normalised.

        Args:
            tokens: those of the first stage.
            chances: what drop_path goes by; see `SwinV2.encode`.

        Raises:
            ValueError: the tokens, or the chances, have another shape.
        """
        axes = ("frames", "rows", "columns")[-len(self.config.map_window) :]
        if tokens.ndim != 2 + len(axes) or tokens.shape[-1] != self.config.embed_dim:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; encode takes what embed gives, "
                f"(batch, {', '.join(axes)}, {self.config.embed_dim})"
            )
        depths = self.config.depths
        if chances is not None and tuple(chances.shape) != (len(tokens), sum(depths), 2):
            raise ValueError(
                f"chances have shape {tuple(chances.shape)}; drop_path takes two for each sample "
                f"and block, {(len(tokens), sum(depths), 2)}"
            )
        parts = (
            [None] * len(depths) if chances is None else torch.split(chances, list(depths), dim=1)
        )
        outputs: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            tokens = stage(self.merges[index - 1](outputs[-1]) if index else tokens, parts[index])
            outputs.append(tokens)
        outputs[-1] = self.norm(outputs[-1])
        return outputs

    def set_execution(self, **changes: Any) -> None:
        """Change how the encoder computes, not what: fields of `Execution` by name.

        For very large inputs `set_execution(attention=("sequential", "sequential", "auto", "auto"),
        checkpointing="full")` trades time for memory.

        Raises:
            ValueError: a choice does not exist, or there is not one for each stage.
            TypeError: a field does not exist.
        """
        execution = replace(self.execution, **changes)
        choices = execution.by_stage(len(self.stages))
        self.execution = execution
        for stage, choice in zip(self.stages, choices, strict=True):
            for block in stage.modules():
                if isinstance(block, Block):
                    block.set_execution(choice)

    def compile_blocks(self, **options: Any) -> None:
        """Compile what every block computes, so that compiling does not take longer with depth.

        A stage takes one graph for its blocks and one for those that are shifted; training and
        evaluation take one each. Weights and their names stay as they are. Options are those of
        torch.compile.
        """
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.compile_blocks(**options)


def build_stages(config: SwinV2Config) -> list[Stage]:
    """Build the stages of an encoder; every second block of each is shifted."""
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


def initialise(encoder: nn.Module) -> None:
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
