"""The encoder for graphs with dynamic height and width: no Python branch depends on a size.

The encoder fits windows, shifts, padding and masks to a map in Python, which tracing would make
constant. Here windows always have their full size, and what depends on the map is computed in the
graph from its input. A map is (batch, tokens, channels) throughout a stage. Two lists of indices
gather its tokens into windows and scatter them back: padding and rolling, partitioning and
reversing at once. Padding repeats the last row or column, and the mask hides it, also where a map
is smaller than a window.

All lengths are expressions of height and width. None is read from a tensor: compilers such as
AOTInductor refuse lengths that they know nothing about.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2.attention import (
    ACROSS_REGIONS,
    LARGEST_LOGIT_SCALE,
    PADDING,
    WindowAttention,
    explicit_attention,
)
from swinv2.blocks import Block, PatchEmbed, PatchMerging, Stage
from swinv2.encoder import SwinV2
from swinv2.field_values import Pair


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Windows along one axis of a map; sizes of the map are scalar int64 tensors."""

    tokens: Tensor
    windows: Tensor
    window: int

    def places(self, places: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
        """Return the original places and the regions of tokens at places of the shifted map.

        Places count from the start of the padded map; for regions see
        `swinv2.attention.window_regions`.
        """
        length = self.windows * self.window
        shift = self.shift(shifted=shifted)
        origins = (places + shift) % length
        regions = (places >= length - self.window).long() + (origins < shift).long()
        return origins, regions

    def shift(self, *, shifted: bool) -> Tensor:
        """Return the shift: half a window, or 0 if one window spans the axis."""
        return (self.windows > 1).long() * (self.window // 2 if shifted else 0)

    def destinations(self, tokens: int, *, shifted: bool) -> Tensor:
        """Return the place of each token in the shifted map, (tokens,)."""
        length = self.windows * self.window
        return (torch.arange(tokens) + length - self.shift(shifted=shifted)) % length


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Partition of a map of tokens, in row-major order, into windows."""

    gather: Tensor
    """Index of the token at each place of each window, (windows, window tokens)."""
    scatter: Tensor
    """Index of each token among the places of all windows, (tokens,)."""
    mask: Tensor
    """Added to the scores of each window, (windows, 1, queries, keys)."""


@dataclass(frozen=True, kw_only=True)
class StagePartitions:
    """Partitions and relative positions that the blocks of a stage share."""

    plain: Partition
    shifted: Partition
    offsets: Tensor
    """Row of the bias table for each pair of tokens of a window, (queries, keys)."""


def partition_map(rows: int, columns: int, window: Pair) -> StagePartitions:
    """Return the partitions of a map into windows, without and with a shift."""
    height, width = window
    windows_down, windows_along = (rows + height - 1) // height, (columns + width - 1) // width
    down = Axis(tokens=_scalar(rows), windows=_scalar(windows_down), window=height)
    along = Axis(tokens=_scalar(columns), windows=_scalar(windows_along), window=width)
    windows = torch.arange(windows_down * windows_along)[:, None]
    places = torch.arange(height * width)
    place_rows, place_columns = places // width, places % width
    row_places = windows // along.windows * height + place_rows
    column_places = windows % along.windows * width + place_columns

    def build(*, shifted: bool) -> Partition:
        from_rows, row_regions = down.places(row_places, shifted=shifted)
        from_columns, column_regions = along.places(column_places, shifted=shifted)
        padded = (from_rows >= down.tokens) | (from_columns >= along.tokens)
        regions = (row_regions * 3 + column_regions).masked_fill(padded, PADDING)
        queries, keys = regions[:, None, :, None], regions[:, None, None, :]
        mask = torch.where(queries == keys, 0.0, ACROSS_REGIONS)
        to_rows = down.destinations(rows, shifted=shifted)[:, None]
        to_columns = along.destinations(columns, shifted=shifted)
        to_windows = to_rows // height * along.windows + to_columns // width
        to_places = to_rows % height * width + to_columns % width
        return Partition(
            gather=torch.minimum(from_rows, down.tokens - 1) * along.tokens
            + torch.minimum(from_columns, along.tokens - 1),
            scatter=(to_windows * (height * width) + to_places).flatten(),
            mask=mask.masked_fill(keys == PADDING, -math.inf),
        )

    row_offsets = place_rows[:, None] - place_rows + height - 1
    column_offsets = place_columns[:, None] - place_columns + width - 1
    return StagePartitions(
        plain=build(shifted=False),
        shifted=build(shifted=True),
        offsets=row_offsets * (2 * width - 1) + column_offsets,
    )


def _scalar(number: int) -> Tensor:
    return torch.scalar_tensor(number, dtype=torch.int64)


class AnySizeAttention(nn.Module):
    """WindowAttention with its partition given as tensors and its constants precomputed."""

    def __init__(self, attention: WindowAttention, window: Pair) -> None:
        super().__init__()
        self.qkv = attention.qkv
        self.projection = attention.projection
        zeros = torch.zeros_like(attention.query_bias)
        qkv_bias = torch.cat((attention.query_bias, zeros, attention.value_bias))
        scale = attention.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()[:, None, None]
        self.register_buffer("qkv_bias", qkv_bias.detach())
        self.register_buffer("scale", scale.detach())
        self.register_buffer("bias_table", bias_table(attention, window))
        self.qkv_bias: Tensor
        self.scale: Tensor
        self.bias_table: Tensor

    def forward(self, tokens: Tensor, partition: Partition, offsets: Tensor) -> Tensor:
        """Attend within windows; (batch, tokens, channels) to the same shape.

        Linear layers see the tokens of the map, without the padding of windows.
        """
        qkv = F.linear(tokens, self.qkv.weight, self.qkv_bias)
        gathered = qkv.index_select(1, partition.gather.flatten())
        windows: Tensor = gathered.unflatten(1, partition.gather.shape)  # type: ignore[no-untyped-call]
        bias = F.embedding(offsets, self.bias_table).permute(2, 0, 1)
        mixed = explicit_attention(windows, scale=self.scale, bias=bias, mask=partition.mask)
        output: Tensor = self.projection(mixed.flatten(1, 2).index_select(1, partition.scatter))
        return output


def bias_table(attention: WindowAttention, window: Pair) -> Tensor:
    """Return the position bias of all offsets in a window, ((2h-1)·(2w-1), heads).

    A smaller window uses a subset of these offsets, with the same bias.
    """
    height, width = window
    rows, columns = torch.arange(1 - height, height), torch.arange(1 - width, width)
    queries = (rows.clamp(min=0) * width)[:, None] + columns.clamp(min=0)
    keys = ((-rows).clamp(min=0) * width)[:, None] + (-columns).clamp(min=0)
    with torch.no_grad():
        bias: Tensor = attention.position_bias(window)
    return bias[:, queries.flatten(), keys.flatten()].t().contiguous()


class AnySizeBlock(nn.Module):
    """A Block in evaluation mode."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.shifted = block.shifted
        self.attention = AnySizeAttention(block.attention, cast(Pair, block.window))
        self.norm1, self.mlp, self.norm2 = block.norm1, block.mlp, block.norm2

    def forward(self, tokens: Tensor, partitions: StagePartitions) -> Tensor:
        """Map (batch, tokens, channels) to the same shape."""
        partition = partitions.shifted if self.shifted else partitions.plain
        tokens = tokens + self.norm1(self.attention(tokens, partition, partitions.offsets))
        mapped: Tensor = tokens + self.norm2(self.mlp(tokens))
        return mapped


class AnySizeStage(nn.Module):
    """A Stage of AnySizeBlocks, in evaluation mode."""

    def __init__(self, stage: Stage, window: Pair) -> None:
        super().__init__()
        self.window = window
        self.extra_norm_every = stage.extra_norm_every
        self.extra_norms = stage.extra_norms
        self.blocks = nn.ModuleList(AnySizeBlock(cast(Block, block)) for block in stage.blocks)

    def forward(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Map (batch, rows·columns, channels) to the same shape."""
        partitions = partition_map(rows, columns, self.window)
        for count, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, partitions)
            if self.extra_norm_every and count % self.extra_norm_every == 0:
                tokens = self.extra_norms[count // self.extra_norm_every - 1](tokens)
        return tokens


class AnySizeFeatures(nn.Module):
    """`SwinV2.features` in evaluation mode, on the CPU, for tracing with dynamic sizes.

    It shares the tensors of the encoder, except for the constants of each attention.
    """

    def __init__(self, encoder: SwinV2) -> None:
        super().__init__()
        self.patch_embed: PatchEmbed = encoder.patch_embed
        self.merges = encoder.merges
        self.norm = encoder.norm
        window = encoder.config.window_size
        self.stages = nn.ModuleList(
            AnySizeStage(cast(Stage, stage), window) for stage in encoder.stages
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of all stages, (batch, channels, rows, columns) each.

        Images are (batch, channels, height, width), at least one pixel high and wide.
        """
        side = self.patch_embed.patch_size
        height, width = images.shape[2:]
        # Quotients without a summand: compilers do not simplify products of sums.
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        whole = F.pad(images, (0, columns * side - width, 0, rows * side - height))
        patches = self.patch_embed.projection(whole)
        tokens = self.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        outputs = []
        for index, stage in enumerate(self.stages):
            if index:
                tokens = merge(cast(PatchMerging, self.merges[index - 1]), tokens, rows, columns)
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
            tokens = stage(tokens, rows, columns)
            last = index == len(self.stages) - 1
            output = self.norm(tokens) if last else tokens
            outputs.append(output.transpose(1, 2).unflatten(2, (rows, columns)))
        return tuple(outputs)


def merge(merging: PatchMerging, tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Apply PatchMerging to (batch, rows·columns, channels)."""
    height, width = _scalar(rows), _scalar(columns)
    outside = height * width
    tokens = F.pad(tokens, (0, 0, 0, 1))  # zeros, for neighbours outside an odd map
    neighbours = []
    for right in (0, 1):
        for below in (0, 1):
            down = (torch.arange((rows + 1) // 2) * 2 + below)[:, None]
            along = torch.arange((columns + 1) // 2) * 2 + right
            inside = (down < height) & (along < width)
            source = torch.where(inside, down * width + along, outside)
            neighbours.append(tokens.index_select(1, source.flatten()))
    merged: Tensor = merging.norm(merging.reduction(torch.cat(neighbours, dim=-1)))
    return merged
