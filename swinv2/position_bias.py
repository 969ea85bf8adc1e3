"""Log-spaced continuous position bias: what an offset between two tokens adds to their score."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2.config import Axes
from swinv2.kernels.cached_tables import kept
from swinv2.kernels.linear import Linear, being_exported, operators_are_watched
from swinv2.kernels.relative_position_ops import spread_offsets

BIAS_HIDDEN = 512
"""Width of the MLP."""


@kept
def offset_coordinates(
    window: Axes, reference: Axes, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Give log-spaced coordinates of all offsets in a window, (offsets, axes).

    Offsets along an axis are from 1 - side to side - 1; those of the last axis vary fastest.
    Paper, equation 4, in the scale of the reference code: they are divided by the largest one of
    the reference window, times 8, then sign(x)·log2(|x| + 1) / log2(8).
    """
    along_axes = (
        torch.arange(1 - side, side, device="cpu", dtype=torch.float64)
        * (8 / max(reference_side - 1, 1))
        for side, reference_side in zip(window, reference, strict=True)
    )
    offsets = torch.cartesian_prod(*along_axes)
    return (offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)).to(device, dtype)


@kept
def offset_index(window: Axes, device: torch.device) -> Tensor:
    """Give the row of offset_coordinates for each (query, key) of a window, int64."""
    tokens = math.prod(window)
    places = torch.arange(tokens, device=device)
    index = places.new_zeros(1, 1)
    for side in window:
        tokens //= side  # of which places along this axis are apart
        along = places // tokens % side
        index = index * (2 * side - 1) + along[:, None] - along + side - 1
    return index


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the precision of the tensors, whatever autocast says."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


@dataclass(frozen=True, eq=False)
class KeptBias:
    """A position bias computed without gradients, and what it was computed of."""

    window: Axes
    copies: tuple[Tensor, ...]
    """Of the weights, on a CPU."""
    versions: tuple[tuple[int, int], ...]
    """Where each weight lay, and how often it had been written there, elsewhere."""
    bias: Tensor

    def fits(self, window: Axes, weights: tuple[Tensor, ...]) -> bool:
        """Tell whether it is that of these weights.

        On a CPU they are compared by value: versions do not see what is written through `.data`.
        Elsewhere that would wait for the device.
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
    """Bias of each head for each offset between two tokens, from a small MLP (section 3.3).

    It has as many coordinates as the reference window has axes.
    """

    def __init__(self, num_heads: int, reference_window: Axes) -> None:
        super().__init__()
        self.reference_window = reference_window
        self.expand = Linear(len(reference_window), BIAS_HIDDEN)
        self.reduce = Linear(BIAS_HIDDEN, num_heads, bias=False)
        self._kept: KeptBias | None = None

    def forward(self, window: Axes) -> Tensor:
        """Give the bias within a window, by its sides in tokens, as (heads, queries, keys)."""
        weights = (self.expand.weight, self.expand.bias, self.reduce.weight)
        if torch.compiler.is_compiling():
            return self._compute(window)
        if not self._may_keep(weights[0]):
            self._kept = None
            return self._compute(window)
        if self._kept is None or not self._kept.fits(window, weights):
            on_cpu = weights[0].is_cpu
            # What is kept outlives the inference mode that it may be first needed in.
            with torch.inference_mode(False), torch.no_grad():
                copies = tuple(weight.detach().clone() for weight in weights if on_cpu)
                versions = () if on_cpu else _versions(weights)
                self._kept = KeptBias(window, copies, versions, self._compute(window))
        return self._kept.bias

    def train(self, mode: bool = True) -> "PositionBias":
        """Switch between training and evaluation, which begins with nothing kept."""
        self._kept = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def _may_keep(self, weight: Tensor) -> bool:
        """Tell whether the bias may be needed again with the same weights.

        Off the CPU, where changes are known by their version, in evaluation alone, and of tensors
        that are really there.
        """
        if torch.is_grad_enabled():
            return False
        unsure = self.training or weight.is_inference() or weight.is_meta
        return weight.is_cpu or not (unsure or operators_are_watched())

    def _compute(self, window: Axes) -> Tensor:
        weight = self.expand.weight
        offsets = offset_coordinates(window, self.reference_window, weight.dtype, weight.device)
        with without_autocast(weight.device):
            # Through operators of ours, so that a compiled backward keeps the precision, too.
            table = 16 * torch.sigmoid(self.reduce(F.relu(self.expand(offsets))))
        index = offset_index(window, weight.device)
        if being_exported():
            return F.embedding(index, table).permute(2, 0, 1)
        bias: Tensor = spread_offsets(table, index, window)
        return bias
