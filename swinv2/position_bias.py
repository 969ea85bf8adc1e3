"""Log-spaced continuous position bias: a score for each relative position of two tokens."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2.config import Axes
from swinv2.kernels.cached_tables import cached_table
from swinv2.kernels.dispatch import is_exporting, use_operators
from swinv2.kernels.linear import Linear
from swinv2.kernels.precision import without_autocast
from swinv2.kernels.relative_position_ops import gather_relative_positions

BIAS_HIDDEN = 512
"""Hidden units of the MLP."""


@cached_table
def relative_coordinates(
    window: Axes, reference: Axes, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the log-spaced coordinates of all offsets in a window, (offsets, axes).

    Offsets along an axis range from 1 - side to side - 1; those of the last axis vary fastest.
    Paper, equation 4, in the scale of the reference code: offsets are divided by the largest one of
    the reference window and multiplied by 8, then sign(x)·log2(|x| + 1) / log2(8).
    """
    along_axes = (
        torch.arange(1 - side, side, device="cpu", dtype=torch.float64)
        * (8 / max(reference_side - 1, 1))
        for side, reference_side in zip(window, reference, strict=True)
    )
    offsets = torch.cartesian_prod(*along_axes)
    return (offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)).to(device, dtype)


@cached_table
def relative_position_index(window: Axes, device: torch.device) -> Tensor:
    """Return the row of `relative_coordinates` for each (query, key) of a window, int32."""
    tokens = math.prod(window)
    places = torch.arange(tokens, dtype=torch.int32, device=device)
    index = places.new_zeros(1, 1)
    for side in window:
        tokens //= side  # stride of this axis
        along = places // tokens % side
        index = index * (2 * side - 1) + along[:, None] - along + side - 1
    return index


class PositionTables(NamedTuple):
    """What a position bias is computed from, besides its weights."""

    coordinates: Tensor
    """See `relative_coordinates`."""
    pairs: Tensor
    """See `relative_position_index`."""


@dataclass(frozen=True, eq=False)
class CachedBias:
    """A position bias computed without gradients, with its window and weights."""

    window: Axes
    copies: tuple[Tensor, ...]
    """The weights; on a CPU only."""
    versions: tuple[tuple[int, int], ...]
    """Address and version counter of each weight; on other devices only."""
    bias: Tensor

    def is_valid(self, window: Axes, weights: tuple[Tensor, ...]) -> bool:
        """Return whether the bias was computed from this window and these weights.

        On a CPU weights are compared by value, since version counters miss writes through `.data`.
        On other devices that comparison would wait for the device.
        """
        if window != self.window or self.bias.device != weights[0].device:
            return False
        if not self.bias.is_cpu:
            return self.versions == _versions(weights)
        return all(
            copy.dtype == now.dtype and torch.equal(copy, now)
            for copy, now in zip(self.copies, weights, strict=True)
        )


def _versions(weights: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


class PositionBias(nn.Module):
    """Bias of each head for each relative position, from a small MLP (section 3.3).

    Its inputs are one coordinate per axis of the reference window.
    """

    def __init__(self, num_heads: int, reference_window: Axes) -> None:
        super().__init__()
        self.reference_window = reference_window
        self.expand = Linear(len(reference_window), BIAS_HIDDEN)
        self.reduce = Linear(BIAS_HIDDEN, num_heads, bias=False)
        self._cached: CachedBias | None = None

    def tables(self, window: Axes) -> PositionTables:
        """Return the tables for a window, given by its sides in tokens."""
        weight = self.expand.weight
        return PositionTables(
            relative_coordinates(window, self.reference_window, weight.dtype, weight.device),
            relative_position_index(window, weight.device),
        )

    def forward(self, window: Axes, tables: PositionTables | None = None) -> Tensor:
        """Return the bias within a window: (heads, queries, keys).

        Args:
            window: its sides in tokens.
            tables: see `tables`; a compiled graph takes them, rather than make them in each call.
        """
        weights = (self.expand.weight, self.expand.bias, self.reduce.weight)
        if tables is None:
            tables = self.tables(window)
        if torch.compiler.is_compiling():
            return self._compute(window, tables)
        if not self._may_cache(weights[0]):
            self._cached = None
            return self._compute(window, tables)
        if self._cached is None or not self._cached.is_valid(window, weights):
            on_cpu = weights[0].is_cpu
            # The cached bias outlives the inference mode in which it may be computed.
            with torch.inference_mode(False), torch.no_grad():
                copies = tuple(weight.detach().clone() for weight in weights if on_cpu)
                versions = () if on_cpu else _versions(weights)
                bias = self._compute(window, tables)
                self._cached = CachedBias(window, copies, versions, bias)
        return self._cached.bias

    def train(self, mode: bool = True) -> "PositionBias":
        """Switch between training and evaluation, which starts with an empty cache."""
        self._cached = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def _may_cache(self, weight: Tensor) -> bool:
        """Return whether the bias may be needed again with the same weights.

        On other devices than a CPU, where a change is known by the version counter, only in
        evaluation, and only for real tensors.
        """
        if torch.is_grad_enabled() or is_exporting():  # what is traced belongs to the trace
            return False
        unsure = self.training or weight.is_inference() or weight.is_meta
        return weight.is_cpu or not (unsure or use_operators())

    def _compute(self, window: Axes, tables: PositionTables) -> Tensor:
        with without_autocast(tables.coordinates.device):
            # Custom operators, so that a compiled backward keeps the precision, too.
            table = 16 * torch.sigmoid(self.reduce(F.relu(self.expand(tables.coordinates))))
        return gather_relative_positions(table, tables.pairs, window)
