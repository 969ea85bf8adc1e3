"""The encoder for a graph whose height and width stay open: no branch depends on a size.

The encoder fits windows, shifts, padding and masks to a map in Python, which a trace would fix.
Here they are tensors, computed in the graph from its input. A map is (batch, tokens, channels)
throughout a stage; which of its tokens a window holds, and where they return to, are two lists of
indices: padding and rolling, cutting and joining at once. An index that fills a window repeats
the last row or column; the mask hides it, so that its features never count.
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
from swinv2.config import Pair
from swinv2.encoder import SwinV2


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Windows along one axis of a map; numbers are tensors () of int64."""

    tokens: Tensor
    window: Tensor
    windows: Tensor
    side: int
    """The window before it was fitted to the map."""

    def places(self, places: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
        """Say where tokens at these places of the shifted map come from, and in which region.

        A place is counted from the start of the padded map; regions are those of
        `swinv2.attention.window_regions`.
        """
        length = self.windows * self.window
        shift = self.shift(shifted=shifted)
        origins = (places + shift) % length
        regions = (places >= length - self.window).long() + (origins < shift).long()
        return origins, regions

    def shift(self, *, shifted: bool) -> Tensor:
        """Give the shift, half a window, or none where one window spans the axis."""
        return (self.windows > 1).long() * (self.side // 2 if shifted else 0)

    def destinations(self, tokens: int, *, shifted: bool) -> Tensor:
        """Give the place of each token in the shifted map, (tokens,)."""
        length = self.windows * self.window
        return (torch.arange(tokens) + length - self.shift(shifted=shifted)) % length


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a map of tokens, row after row, is cut into windows and joined again."""

    gather: Tensor
    """The token at each place of each window, (windows, tokens of a window)."""
    scatter: Tensor
    """The place of each token among those of all windows, (tokens,)."""
    mask: Tensor
    """What is added to the scores of each window, (windows, 1, queries, keys)."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """What the blocks of a stage share."""

    plain: Cut
    shifted: Cut
    offsets: Tensor
    """Row of the bias table for each query and key of a window, (queries, keys)."""


def fit_axis(tokens: int, side: int) -> Axis:
    """Fit windows to one axis of a map, as `swinv2.config.clamp_window` does."""
    number = torch.scalar_tensor(tokens, dtype=torch.int64)
    window = number.clamp(max=side)
    return Axis(tokens=number, window=window, windows=(number + window - 1) // window, side=side)


def cut_map(rows: int, columns: int, window: Pair) -> Cuts:
    """Cut a map of tokens into windows, without and with a shift."""
    down, along = fit_axis(rows, window[0]), fit_axis(columns, window[1])
    windows = torch.arange(_length(down.windows * along.windows))[:, None]
    places = torch.arange(_length(down.window * along.window))
    place_rows, place_columns = places // along.window, places % along.window
    row_places = windows // along.windows * down.window + place_rows
    column_places = windows % along.windows * along.window + place_columns

    def cut(*, shifted: bool) -> Cut:
        from_rows, row_regions = down.places(row_places, shifted=shifted)
        from_columns, column_regions = along.places(column_places, shifted=shifted)
        padded = (from_rows >= down.tokens) | (from_columns >= along.tokens)
        regions = (row_regions * 3 + column_regions).masked_fill(padded, PADDING)
        queries, keys = regions[:, None, :, None], regions[:, None, None, :]
        mask = torch.where(queries == keys, 0.0, ACROSS_REGIONS)
        to_rows = down.destinations(rows, shifted=shifted)[:, None]
        to_columns = along.destinations(columns, shifted=shifted)
        to_windows = to_rows // down.window * along.windows + to_columns // along.window
        to_places = to_rows % down.window * along.window + to_columns % along.window
        return Cut(
            gather=torch.minimum(from_rows, down.tokens - 1) * along.tokens
            + torch.minimum(from_columns, along.tokens - 1),
            scatter=(to_windows * (down.window * along.window) + to_places).flatten(),
            mask=mask.masked_fill(keys == PADDING, -math.inf),
        )

    row_offsets = place_rows[:, None] - place_rows + window[0] - 1
    column_offsets = place_columns[:, None] - place_columns + window[1] - 1
    return Cuts(
        plain=cut(shifted=False),
        shifted=cut(shifted=True),
        offsets=row_offsets * (2 * window[1] - 1) + column_offsets,
    )


def _length(number: Tensor) -> int:
    """Turn a positive number into a length; in a trace it is a symbol of its own."""
    length = cast(int, number.item())
    torch._check(length >= 1)  # type: ignore[no-untyped-call]
    return length


class AnySizeAttention(nn.Module):
    """WindowAttention with its grid given as tensors, and what is constant computed once."""

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

    def forward(self, tokens: Tensor, cut: Cut, offsets: Tensor) -> Tensor:
        """Mix (batch, tokens, channels) within windows."""
        gathered = tokens.index_select(1, cut.gather.flatten())
        windows: Tensor = gathered.unflatten(1, cut.gather.shape)  # type: ignore[no-untyped-call]
        qkv = F.linear(windows, self.qkv.weight, self.qkv_bias)
        bias = F.embedding(offsets, self.bias_table).permute(2, 0, 1)
        mixed = explicit_attention(qkv, scale=self.scale, bias=bias, mask=cut.mask)
        joined: Tensor = self.projection(mixed).flatten(1, 2)
        return joined.index_select(1, cut.scatter)


def bias_table(attention: WindowAttention, window: Pair) -> Tensor:
    """Give the position bias of all offsets in a window, ((2h-1)·(2w-1), heads).

    A smaller window has a part of these offsets, with the same bias.
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

    def forward(self, tokens: Tensor, cuts: Cuts) -> Tensor:
        """Map (batch, tokens, channels) to the same shape."""
        cut = cuts.shifted if self.shifted else cuts.plain
        tokens = tokens + self.norm1(self.attention(tokens, cut, cuts.offsets))
        mapped: Tensor = tokens + self.norm2(self.mlp(tokens))
        return mapped


class AnySizeStage(nn.Module):
    """A Stage of such blocks."""

    def __init__(self, stage: Stage, window: Pair) -> None:
        super().__init__()
        self.window = window
        self.extra_norm_every = stage.extra_norm_every
        self.extra_norms = stage.extra_norms
        self.blocks = nn.ModuleList(AnySizeBlock(cast(Block, block)) for block in stage.blocks)

    def forward(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Map (batch, rows·columns, channels) to the same shape."""
        cuts = cut_map(rows, columns, self.window)
        for count, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, cuts)
            if self.extra_norm_every and count % self.extra_norm_every == 0:
                tokens = self.extra_norms[count // self.extra_norm_every - 1](tokens)
        return tokens


class AnySizeFeatures(nn.Module):
    """`SwinV2.features` of an encoder in evaluation mode, on the CPU, for a trace with open sizes.

    The tensors are the encoder's own, but for what is constant in each attention.
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
        """Turn (batch, channels, height, width) into a map (batch, channels, rows, columns) each.

        Any height and width of a pixel or more will do.
        """
        # With a patch less a pixel of padding, rounding down is rounding up without it.
        margin = self.patch_embed.patch_size - 1
        patches = self.patch_embed.projection(F.pad(images, (0, margin, 0, margin)))
        rows, columns = patches.shape[2:]
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
    """Do as PatchMerging does, on (batch, rows·columns, channels)."""
    height, width = (torch.scalar_tensor(side, dtype=torch.int64) for side in (rows, columns))
    outside = height * width
    tokens = F.pad(tokens, (0, 0, 0, 1))  # the token outside an odd map: zeros
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
