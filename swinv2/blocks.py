"""Parts of the encoder: patch embedding, the residual-post-norm block, stage, patch merging."""

from collections.abc import Callable
from itertools import count
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swinv2.attention import WindowAttention, WindowGrid, WindowTables, window_grid
from swinv2.compat import copied_function
from swinv2.config import AttentionPath, Axes, Checkpointing, Execution
from swinv2.kernels.dispatch import is_exporting
from swinv2.kernels.linear import Linear, linear
from swinv2.kernels.precision import LayerNorm

NOISE_RANGE = 2**31
"""Drop path noise is an integer in [0, NOISE_RANGE), which no low-precision arithmetic rounds."""

COMPILED_COPIES = count()
"""Numbers the copies of `Block.run` that are compiled."""


def drop_path_factor(
    tokens: Tensor, rate: float, *, training: bool, noise: Tensor | None = None
) -> Tensor | None:
    """Return the factor of stochastic depth for a residual branch of each sample of (batch, ...).

    With probability `rate` it is 0, otherwise 1 / (1 - rate), so that the mean is kept; None in
    evaluation and at rate 0. It is drawn, or follows from `noise`: int32 (batch,), uniform in
    [0, NOISE_RANGE). Source: Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """
    if not training or rate == 0:
        return None
    shape = (len(tokens), *[1] * (tokens.ndim - 1))
    if noise is None:
        kept = tokens.new_empty(shape).bernoulli_(1 - rate)
    else:
        kept = (noise >= round(rate * NOISE_RANGE)).to(tokens.dtype).view(shape)
    return kept / (1 - rate)


class PatchEmbed(nn.Module):
    """Linear projection of square patches to tokens, followed by a LayerNorm."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Turn (batch, channels, height, width) into (batch, rows, columns, dim).

        Images are padded with zeros, below and to the right, to whole patches.
        """
        below, right = (-side % self.patch_size for side in images.shape[2:])
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        # A convolution with stride equal to its kernel, as a product that leaves channels last.
        patches = rearrange(
            images,
            "batch channels (rows h) (columns w) -> batch rows columns (channels h w)",
            h=self.patch_size,
            w=self.patch_size,
        )
        weight = self.projection.weight.flatten(1)
        tokens: Tensor = self.norm(linear(patches, weight, self.projection.bias))
        return tokens


class PatchMerging(nn.Module):
    """Merging of each 2x2 neighbourhood into one token with twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(2 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn (..., rows, columns, dim) into (..., rows/2, columns/2, 2·dim), rounded up.

        Odd maps are padded with zeros. Neighbours are concatenated column by column, as in the
        reference code; each frame of a clip is merged separately.
        """
        below, right = tokens.shape[-3] % 2, tokens.shape[-2] % 2
        if below or right:
            tokens = F.pad(tokens, (0, 0, 0, right, 0, below))
        neighbours = rearrange(
            tokens,
            "... (rows down) (columns right) channels -> ... rows columns (right down channels)",
            down=2,
            right=2,
        )
        merged: Tensor = self.norm(self.reduction(neighbours))
        return merged


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = Linear(dim, hidden)
        self.reduce = Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map each token of (..., dim)."""
        output: Tensor = self.reduce(F.gelu(self.expand(tokens)))
        return output


class Block(nn.Module):
    """Window attention and an MLP, each normalised before it joins the main branch (section 3.2).

    Both norms start at zero, so a fresh block is the identity.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: Axes,
        shifted: bool,
        reference_window: Axes,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window = window
        self.shifted = shifted
        self.drop_path = drop_path
        self.checkpointing: Checkpointing = "none"
        self.compiled_run: Callable[..., Tensor] | None = None
        self.attention = WindowAttention(dim, num_heads, reference_window)
        self.norm1 = LayerNorm(dim)
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.norm2 = LayerNorm(dim)

    def forward(self, tokens: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Map (batch, *resolution, dim) to the same shape.

        The noise of drop path, int32 (batch, 2) for the two branches, is drawn if it is None.
        """
        grid = window_grid(tuple(tokens.shape[1:-1]), self.window, shifted=self.shifted)
        # Computed here, the factors and their rate are not part of what is compiled or recomputed.
        noises = (None, None) if drop_path_noise is None else drop_path_noise.unbind(1)
        factors = [
            drop_path_factor(tokens, self.drop_path, training=self.training, noise=noise)
            for noise in noises
        ]
        # A graph traced around the block contains the block's operations, not a compiled graph.
        traced = torch.compiler.is_compiling() or is_exporting()
        run = Block.run if traced or self.compiled_run is None else self.compiled_run
        # Made here, tables are inputs of a compiled graph, which would make them in every call.
        tables = self.attention.tables(grid)
        if self.checkpointing == "full" and torch.is_grad_enabled():
            return _recompute(run, self, tokens, grid, tables, *factors)
        return run(self, tokens, grid, tables, *factors)

    def set_execution(self, execution: Execution) -> None:
        """Set the attention path and the checkpointing of one stage."""
        self.checkpointing = cast(Checkpointing, execution.checkpointing)
        self.attention.path = cast(AttentionPath, execution.attention)
        self.attention.scores_at_a_time = execution.scores_at_a_time

    def run(
        self,
        tokens: Tensor,
        grid: WindowGrid,
        tables: WindowTables,
        mixing: Tensor | None,
        mapping: Tensor | None,
    ) -> Tensor:
        """Compute the block in a given grid, with the drop path factors of its two branches."""
        if self.checkpointing == "attention" and torch.is_grad_enabled():
            branch = _recompute(self.attention, tokens, grid, tables)
        else:
            branch = self.attention(tokens, grid, tables)
        tokens = _join(tokens, self.norm1(branch), mixing)
        return _join(tokens, self.norm2(self.mlp(tokens)), mapping)


def compile_run(**options: Any) -> Callable[..., Tensor]:
    """Compile `Block.run`, without graph breaks; options are those of torch.compile.

    Dynamo caches and limits graphs per code object, and marks changing sizes dynamic by the code's
    name. A copy with a name of its own has its own cache, so that blocks which differ in their
    shapes or grid do not use up each other's, and only the batch may become dynamic.
    """
    name = f"run_{next(COMPILED_COPIES)}"
    run = copied_function(Block.run, name)
    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True, **options)
    return compiled


def _join(tokens: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    return tokens + (branch if factor is None else branch * factor)


def _recompute(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Keep only the arguments for the backward, which computes the function again."""
    output: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return output


class Stage(nn.Module):
    """Blocks at one resolution, with a LayerNorm after every `extra_norm_every` (appendix)."""

    def __init__(self, blocks: list[Block], dim: int, extra_norm_every: int) -> None:
        super().__init__()
        self.extra_norm_every = extra_norm_every
        num_extra_norms = len(blocks) // extra_norm_every if extra_norm_every else 0
        self.blocks = nn.ModuleList(blocks)
        self.extra_norms = nn.ModuleList(LayerNorm(dim) for _ in range(num_extra_norms))

    def compile_blocks(self, **options: Any) -> None:
        """Compile one function for the plain blocks and one for the shifted ones."""
        compiled = {shifted: compile_run(**options) for shifted in (False, True)}
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled_run = compiled[block.shifted]

    def forward(self, tokens: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Map (batch, *resolution, dim) to the same shape; the noise is (batch, blocks, 2)."""
        for number, block in enumerate(self.blocks, start=1):
            noise = None if drop_path_noise is None else drop_path_noise[:, number - 1]
            tokens = block(tokens, noise)
            if self.extra_norm_every and number % self.extra_norm_every == 0:
                tokens = self.extra_norms[number // self.extra_norm_every - 1](tokens)
        return tokens
