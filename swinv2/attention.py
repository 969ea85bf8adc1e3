"""Window attention: partition, shift and mask, scaled cosine scores, position bias."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from swinv2.config import AttentionPath, Axes, clamp_window
from swinv2.kernels.cached_tables import cached_table
from swinv2.kernels.dispatch import choose_attention
from swinv2.kernels.fused import fused_attention, region_mask
from swinv2.kernels.linear import Linear, linear
from swinv2.kernels.precision import without_autocast
from swinv2.kernels.sequential import MIN_NORM, sequential_attention
from swinv2.position_bias import PositionBias, PositionTables

LARGEST_LOGIT_SCALE = math.log(100)
ACROSS_REGIONS = -100.0  # added to scores between regions that only the shift brought together
PADDING = -1  # the region of padding tokens


@dataclass(frozen=True)
class WindowGrid:
    """Partition of a map of tokens into windows.

    Sizes are in tokens along the axes of the map: (rows, columns) of an image, (frames, rows,
    columns) of a clip.
    """

    resolution: Axes
    window: Axes
    shift: Axes

    @property
    def padding(self) -> Axes:
        """Tokens added at the end of each axis to fill the last windows."""
        return tuple(
            -tokens % side for tokens, side in zip(self.resolution, self.window, strict=True)
        )

    @property
    def windows(self) -> Axes:
        """Windows along each axis."""
        return tuple(
            -(-tokens // side) for tokens, side in zip(self.resolution, self.window, strict=True)
        )

    @property
    def needs_mask(self) -> bool:
        """Whether some pair of tokens in a window must not attend to each other."""
        return any(self.shift) or any(self.padding)


def window_grid(resolution: Axes, window: Axes, *, shifted: bool) -> WindowGrid:
    """Fit windows to a map of tokens, each axis separately; a shift is half a window.

    Sizes are in tokens along each axis. An axis that one window spans is not shifted.
    """
    fitted = [clamp_window(tokens, side) for tokens, side in zip(resolution, window, strict=True)]
    shift = tuple(side // 2 if shifted and moves else 0 for side, moves in fitted)
    return WindowGrid(resolution, tuple(side for side, _ in fitted), shift)


def shift_tokens(tokens: Tensor, grid: WindowGrid) -> Tensor:
    """Pad (batch, *resolution, channels) to whole windows, then roll it by the shift."""
    if any(grid.padding):
        # F.pad takes (before, after) pairs from the last axis to the first; channels get none.
        ends = [side for behind in reversed(grid.padding) for side in (0, behind)]
        tokens = F.pad(tokens, (0, 0, *ends))
    return _roll(tokens, tuple(-tokens_moved for tokens_moved in grid.shift))


def unshift_tokens(tokens: Tensor, grid: WindowGrid) -> Tensor:
    """Undo `shift_tokens`: roll back, then crop the padding."""
    tokens = _roll(tokens, grid.shift)
    inside = (slice(None), *(slice(length) for length in grid.resolution))
    return tokens[inside]


def _roll(tokens: Tensor, shift: Axes) -> Tensor:
    axes = [axis for axis, moved in enumerate(shift) if moved]
    if not axes:
        return tokens
    return tokens.roll([shift[axis] for axis in axes], dims=[1 + axis for axis in axes])


MAP_AND_WINDOWS = {
    2: ("batch (rows h) (columns w) channels", "batch (rows columns) (h w) channels"),
    3: (
        "batch (frames t) (rows h) (columns w) channels",
        "batch (frames rows columns) (t h w) channels",
    ),
}
"""For maps of two and of three axes: einops patterns of the map and of its windows."""


def partition(tokens: Tensor, grid: WindowGrid) -> Tensor:
    """Partition (batch, *resolution, channels) into (batch, windows, window tokens, channels)."""
    as_map, as_windows = MAP_AND_WINDOWS[len(grid.window)]
    return rearrange(tokens, f"{as_map} -> {as_windows}", **_sides(grid))


def reverse(windows: Tensor, grid: WindowGrid) -> Tensor:
    """Undo `partition`."""
    as_map, as_windows = MAP_AND_WINDOWS[len(grid.window)]
    return rearrange(windows, f"{as_windows} -> {as_map}", **_sides(grid), **_numbers(grid))


def _sides(grid: WindowGrid) -> dict[str, int]:
    """Return the sides of a window by their names in MAP_AND_WINDOWS."""
    axes = len(grid.window)
    return dict(zip(("t", "h", "w")[-axes:], grid.window, strict=True))


def _numbers(grid: WindowGrid) -> dict[str, int]:
    """Return the windows along each axis by their names in MAP_AND_WINDOWS."""
    axes = len(grid.window)
    return dict(zip(("frames", "rows", "columns")[-axes:], grid.windows, strict=True))


def window_mask(grid: WindowGrid, device: torch.device) -> Tensor:
    """Return the mask that is added to the scores of each window, (windows, 1, queries, keys).

    Minus infinity for padding keys, which nothing may attend to; -100, as in the reference code,
    between tokens that are neighbours only because the shift wrapped the map around; 0 elsewhere.
    """
    return _mask(window_regions(grid, device), grid)


def _mask(regions: Tensor, grid: WindowGrid) -> Tensor:
    return region_mask(regions, ACROSS_REGIONS, PADDING if any(grid.padding) else None)


@cached_table
def window_regions(grid: WindowGrid, device: torch.device) -> Tensor:
    """Return the region number of each token of each window, (windows, tokens), int64.

    Tokens of a window have the same number if they were neighbours before the shift; padding tokens
    have PADDING.
    """
    regions, *others = (_axis_regions(grid, axis, device) for axis in range(len(grid.window)))
    padded = regions == PADDING
    for along in others:
        regions = regions[..., None] * 3 + along
        padded = padded[..., None] | (along == PADDING)
    regions = regions.masked_fill(padded, PADDING)
    return partition(regions[None, ..., None], grid)[0, :, :, 0]


def _axis_regions(grid: WindowGrid, axis: int, device: torch.device) -> Tensor:
    """Return the region numbers along one axis of the shifted map."""
    window, shift = grid.window[axis], grid.shift[axis]
    length = grid.windows[axis] * window
    positions = torch.arange(length, device=device)
    before_shift = (positions + shift) % length
    regions = (positions >= length - window).long() + (before_shift < shift)
    return regions.masked_fill(before_shift >= grid.resolution[axis], PADDING)


class WindowGroup(NamedTuple):
    """Windows of a grid that have the same mask."""

    places: tuple[slice, ...]
    """Places of the windows along each axis of the grid."""
    first: int
    """Number of the first window."""
    masked: bool
    """Whether the mask is other than 0."""


def windows_by_mask(grid: WindowGrid) -> tuple[WindowGroup, ...]:
    """Group the windows of a grid by their masks, of which there are few.

    Only the last windows along an axis have one, and only where they are shifted or padded.
    """
    groups = []
    for runs in itertools.product(*(_runs(grid, axis) for axis in range(len(grid.window)))):
        first = 0
        for number, run in zip(grid.windows, runs, strict=True):
            first = first * number + run.start
        places = tuple(slice(run.start, run.end) for run in runs)
        groups.append(WindowGroup(places, first, any(run.masked for run in runs)))
    return tuple(groups)


class _Run(NamedTuple):
    start: int
    end: int
    masked: bool


def _runs(grid: WindowGrid, axis: int) -> list[_Run]:
    """Return the runs of windows along one axis that have the same regions."""
    window, shift, tokens = grid.window[axis], grid.shift[axis], grid.resolution[axis]
    last = grid.windows[axis] - 1

    def regions(number: int) -> tuple[int, ...]:
        first = number * window + shift
        origins = (place % ((last + 1) * window) for place in range(first, first + window))
        return tuple(PADDING if origin >= tokens else origin < shift for origin in origins)

    runs: list[_Run] = []
    before: tuple[int, ...] | None = None
    for number in range(last + 1):
        pattern = regions(number)
        if pattern == before:
            runs[-1] = _Run(runs[-1].start, number + 1, runs[-1].masked)
        else:
            masked = len(set(pattern)) > 1 or PADDING in pattern
            runs.append(_Run(number, number + 1, masked))
        before = pattern
    return runs


def explicit_attention(qkv: Tensor, *, scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by scaled cosine similarity: softmax(scale · cos(query, key) + bias + mask) · value.

    Paper, equation 2. From (batch, windows, tokens, 3·heads·d), queries, keys and values
    concatenated, to (batch, windows, tokens, heads·d); scale is (heads, 1, 1), bias (heads, tokens,
    tokens), mask (windows, 1, tokens, tokens). Everything but the two products is computed in at
    least float32, under autocast too.
    """
    with without_autocast(qkv.device):
        query, key, value = _directions_and_values(qkv, scale)
        scores = (query @ key.transpose(-2, -1)).to(scale.dtype) + bias
        if mask is not None:
            scores += mask
        mixed = scores.softmax(dim=-1).to(value.dtype) @ value
    return mixed.transpose(2, 3).flatten(3)


def sdpa_attention(
    qkv: Tensor, *, scale: Tensor, bias: Tensor, grid: WindowGrid, regions: Tensor | None
) -> Tensor:
    """Compute `explicit_attention` with torch's scaled_dot_product_attention.

    Windows of the same mask are computed together, and share what is added to their scores.

    Args:
        qkv: see `explicit_attention`.
        scale: see `explicit_attention`.
        bias: see `explicit_attention`.
        grid: the windows.
        regions: see `window_regions`; None if the grid needs no mask.
    """
    with without_autocast(qkv.device):
        roles = _directions_and_values(qkv, scale)
        if regions is None:
            return rearrange(_attend_alike(*roles, bias), _HEADS_APART)
        maps = [part.unflatten(1, grid.windows) for part in roles]  # type: ignore[no-untyped-call]
        mixed = torch.empty_like(maps[2])
        for places, first, masked in windows_by_mask(grid):
            added = bias + _mask(regions[first : first + 1], grid)[0] if masked else bias
            here = (slice(None), *places)
            query, key, value = (part[here].flatten(1, len(places)) for part in maps)
            mixed[here] = _attend_alike(query, key, value, added).view_as(mixed[here])
        return rearrange(mixed.flatten(1, len(grid.windows)), _HEADS_APART)


_HEADS_APART = "batch windows heads tokens d -> batch windows tokens (heads d)"

_SDPA_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""All but cuDNN's, whose gradients are NaN for some windows in some versions."""


def _attend_alike(query: Tensor, key: Tensor, value: Tensor, added: Tensor) -> Tensor:
    """Attend in (batch, windows, heads, tokens, d), with the same (heads, queries, keys) added."""
    images, tokens = value.shape[0], value.shape[3]
    query, key, value = (part.flatten(0, 1) for part in (query, key, value))
    # Rows of other lengths would be copied for each window, to align them.
    added = F.pad(added.to(value.dtype), (0, -tokens % 16))[..., :tokens]
    added = added.expand(len(value), -1, -1, -1)
    with sdpa_kernel(_SDPA_KERNELS) if value.is_cuda else nullcontext():
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=1.0)
    return mixed.unflatten(0, (images, -1))  # type: ignore[no-untyped-call,no-any-return]


def _directions_and_values(qkv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split into (batch, windows, heads, tokens, d); normalise queries and keys, scale queries.

    Computed in the precision of scale, and rounded to that of qkv.
    """
    query, key, value = rearrange(
        qkv,
        "batch windows tokens (roles heads d) -> roles batch windows heads tokens d",
        roles=3,
        heads=len(scale),
    )
    precise = query.to(scale.dtype), key.to(scale.dtype)
    query, key = precise[0] * (scale / _norm(precise[0])), precise[1] / _norm(precise[1])
    return query.to(value.dtype), key.to(value.dtype), value


def _norm(vectors: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return norm.clamp_min(MIN_NORM)


class WindowAttention(nn.Module):
    """Scaled cosine attention within the windows of a map of tokens."""

    def __init__(self, dim: int, num_heads: int, reference_window: Axes) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.path: AttentionPath = "auto"
        self.scores_at_a_time: int | None = None
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(dim))
        self.value_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.full((num_heads,), math.log(10)))
        self.position_bias = PositionBias(num_heads, reference_window)
        self.projection = Linear(dim, dim)

    def tables(self, grid: WindowGrid) -> "WindowTables":
        """Return the tables for a grid of windows."""
        device = self.logit_scale.device
        regions = window_regions(grid, device) if grid.needs_mask else None
        return WindowTables(self.position_bias.tables(grid.window), regions)

    def forward(
        self, tokens: Tensor, grid: WindowGrid, tables: "WindowTables | None" = None
    ) -> Tensor:
        """Map (batch, *resolution, channels) to the same shape, attending within the windows.

        Args:
            tokens: a map of tokens.
            grid: the windows.
            tables: see `tables`; a compiled graph takes them, rather than make them in each call.
        """
        if tables is None:
            tables = self.tables(grid)
        qkv_bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        windows = partition(shift_tokens(tokens, grid), grid)
        qkv = linear(windows, self.qkv.weight, qkv_bias)

        precise = torch.promote_types(self.logit_scale.dtype, torch.float32)
        scale = self.logit_scale.to(precise).clamp(max=LARGEST_LOGIT_SCALE).exp()[:, None, None]
        bias = self.position_bias(grid.window, tables.position).to(precise)
        mixed = self._attend(qkv, scale, bias, grid, tables.regions)

        output: Tensor = self.projection(mixed)
        return unshift_tokens(reverse(output, grid), grid)

    def _attend(
        self, qkv: Tensor, scale: Tensor, bias: Tensor, grid: WindowGrid, regions: Tensor | None
    ) -> Tensor:
        kernel = choose_attention(self.path, qkv)
        if kernel == "sdpa":
            return sdpa_attention(qkv, scale=scale, bias=bias, grid=grid, regions=regions)
        mask = None if regions is None else _mask(regions, grid)
        match kernel:
            case "explicit":
                return explicit_attention(qkv, scale=scale, bias=bias, mask=mask)
            case "fused":
                return fused_attention(qkv, scale=scale, bias=bias, mask=mask)
            case "sequential" | "sequential_saving":
                return sequential_attention(
                    qkv,
                    scale=scale,
                    bias=bias,
                    mask=mask,
                    scores_at_a_time=self.scores_at_a_time,
                    save_weights=kernel == "sequential_saving",
                )


class WindowTables(NamedTuple):
    """Tables of a block that depend on sizes only."""

    position: PositionTables
    regions: Tensor | None
    """See `window_regions`; None if the grid needs no mask."""
