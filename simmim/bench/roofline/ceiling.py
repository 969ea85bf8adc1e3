"""The roofline: the least time that counted operations and bytes take. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

PRODUCTS_OF_A_STEP = 3
"""Products of a training step for each of the forward pass: two more for the gradients."""


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Sizes of a training step."""

    variant: str
    image_size: int
    """Side in pixels."""
    window_size: int
    """Side in tokens."""

    def __str__(self) -> str:
        return f"{self.variant} {self.image_size}/{self.window_size}"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something that is computed in one go: it reads from memory, and writes to it."""

    name: str
    flops: float
    """Floating-point operations of matrix products."""
    bytes: float
    """Bytes read and written."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a device reaches, measured or from its data sheet."""

    flops: float
    """Operations per second of bf16 matrix products."""
    bytes: float
    """Bytes per second read and written."""


DATA_SHEETS = {
    "H100": Peaks(flops=989e12, bytes=3.35e12),
    "H200": Peaks(flops=989e12, bytes=4.8e12),
}
"""Peaks of the SXM devices: dense bf16, without sparsity."""


def least_seconds(operations: Iterable[Operation], peaks: Peaks) -> float:
    """Return the least time of operations one after another.

    Each takes the time of its products or of its bytes, whichever is longer.
    """
    return sum(
        max(operation.flops / peaks.flops, operation.bytes / peaks.bytes)
        for operation in operations
    )


def share_of_peak(forward_flops: float, images: float, seconds: float, peaks: Peaks) -> float:
    """Return the model FLOP utilisation of training on so many images in so many seconds.

    Counts the products that the model requires, those of a forward pass three times: not what is
    computed again.
    """
    return PRODUCTS_OF_A_STEP * forward_flops * images / seconds / peaks.flops
