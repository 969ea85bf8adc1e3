"""Masks as tensors, and the distance of masked from visible pixels.

Masks are bool, True = hidden, one value per mask cell. Every strategy
(`simmim.method.strategies`) hides exactly ``hidden_count`` cells of every image and draws from an
explicit generator.
"""

import numbers
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeGuard

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from simmim.method.settings import Grid, hidden_count
from simmim.method.strategies import (
    BlockMask,
    MaskSettings,
    MaskStrategy,
    RandomMask,
    SquareMask,
)

GOOD_DISTANCES = (10, 20)
"""Range of AvgDist in pixels with good fine-tuning accuracy (SimMIM, section 4.1.2)."""

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices without float64."""


@dataclass(frozen=True)
class MaskGenerator:
    """Generator of one image's mask; picklable, so that it can be sent to worker processes."""

    grid: Grid
    ratio: float
    strategy: MaskStrategy = field(default_factory=RandomMask)

    @classmethod
    def from_settings(cls, settings: MaskSettings, image_size: Grid) -> "MaskGenerator":
        """Return the generator for images of this height and width in pixels.

        Raises:
            ValueError: the cells do not tile the image, or no cell would stay visible.
        """
        grid = settings.grid(image_size)
        return cls(grid=grid, ratio=settings.ratio, strategy=settings.chosen)

    def __call__(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a bool mask (rows, columns), True = hidden."""
        return draw_masks(self.strategy, 1, self.grid, self.ratio, generator)[0]


def random_mask(
    batch: int, grid: Grid, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Hide cells drawn uniformly without replacement (SimMIM, section 3.2).

    Args:
        batch: number of masks.
        grid: rows and columns of mask cells.
        ratio: fraction of the cells to hide, 0 to 1.
        generator: random generator; the mask is on its device.

    Returns:
        bool (batch, rows, columns), True = hidden, exactly ``hidden_count(grid, ratio)`` per image.
    """
    if batch == 1:  # in data workers, where torch calls cost more
        return draw_masks(RandomMask(), batch, grid, ratio, generator)
    _check_request(batch, grid, ratio, generator)
    rows, columns = grid
    hidden = hidden_count(grid, ratio)
    device = _device(generator)
    noise = torch.rand(
        batch, rows * columns, generator=generator, device=device, dtype=_widest(device)
    )
    mask = torch.zeros_like(noise, dtype=torch.bool)
    mask.scatter_(1, noise.argsort(dim=1, stable=True)[:, :hidden], True)
    return mask.view(batch, rows, columns)


def _check_request(batch: object, grid: object, ratio: object, generator: object) -> None:
    """Check the types of the arguments of a mask function.

    Raises:
        TypeError: one is something else; names it.
        ValueError: a number is too small; names it.
    """
    text = f"batch is {batch!r}; give the number of masks, an integer of at least 0."
    if not _is_integer(batch):
        raise TypeError(text)
    if int(batch) < 0:
        raise ValueError(text)
    text = f"grid is {grid!r}; give rows and columns, two integers of at least 1."
    sizes = list(grid) if isinstance(grid, list | tuple) else []
    if len(sizes) != 2 or not all(map(_is_integer, sizes)):
        raise TypeError(text)
    if min(sizes) < 1:
        raise ValueError(text)
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
        raise TypeError(f"ratio is {ratio!r}; give the fraction to hide, a number from 0 to 1.")
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"generator is {generator!r}; give torch.Generator().manual_seed(…), or None."
        )


def _is_integer(value: object) -> TypeGuard[numbers.Integral]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def square_mask(
    batch: int, grid: Grid, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Hide one square at a random position; see `SquareMask` and, for the rest, `random_mask`."""
    return draw_masks(SquareMask(), batch, grid, ratio, generator)


def block_mask(
    batch: int, grid: Grid, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Hide blocks as BEiT does; see `BlockMask` and, for the rest, `random_mask`."""
    return draw_masks(BlockMask(), batch, grid, ratio, generator)


def draw_masks(
    strategy: MaskStrategy,
    batch: int,
    grid: Grid,
    ratio: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the masks of a strategy one by one; other arguments and result as in `random_mask`."""
    _check_request(batch, grid, ratio, generator)
    hidden, draws = hidden_count(grid, ratio), TorchDraws(generator)
    masks = [torch.from_numpy(strategy.draw(grid, hidden, draws)) for _ in range(batch)]
    mask = torch.stack(masks) if masks else torch.zeros(0, *grid, dtype=torch.bool)
    return mask.to(_device(generator))


@dataclass(frozen=True)
class TorchDraws:
    """Random numbers of a torch generator, for strategies; None is the global one of the CPU."""

    generator: torch.Generator | None

    def uniform(self) -> float:
        """Return a number from 0 to below 1."""
        return float(self._rand(()))

    def uniforms(self, count: int) -> NDArray[np.floating[Any]]:
        """Return numbers from 0 to below 1."""
        numbers: NDArray[np.floating[Any]] = self._rand((count,)).cpu().numpy()
        return numbers

    def integer(self, below: int) -> int:
        """Return an integer from 0 to below `below`."""
        return min(below - 1, int(self.uniform() * below))

    def _rand(self, shape: tuple[int, ...]) -> Tensor:
        device = _device(self.generator)
        return torch.rand(shape, generator=self.generator, device=device, dtype=_widest(device))


def average_distance(mask: Tensor, cell: int) -> float:
    """Return AvgDist, the mean distance in pixels from a masked pixel to the nearest visible one.

    Computed exactly, between pixel centres (SimMIM, section 4.1.2).

    Args:
        mask: bool (batch, rows, columns), True = hidden.
        cell: side of a mask cell in pixels.

    Raises:
        ValueError: an image has no hidden or no visible cells.
    """
    hidden = mask.flatten(1)
    if bool((hidden.all(1) | ~hidden.any(1)).any()):
        raise ValueError(
            "AvgDist needs hidden and visible cells in each image: choose a mask ratio that leaves "
            "both."
        )
    _, rows, columns = mask.shape
    from_row = _squared_distance_to_cells(rows, cell).to(mask.device)
    from_column = _squared_distance_to_cells(columns, cell).to(mask.device)
    total = 0.0
    for image in mask:
        # The nearest visible pixel of each column of cells, then the nearest of all columns.
        visible = torch.where(image, torch.inf, 0.0)
        within = (from_row[:, :, None] + visible).amin(dim=1)
        nearest = (within[:, None] + from_column).amin(dim=2)
        total += float(nearest.sqrt().cpu().sum(dtype=torch.float64))
    return total / (int(mask.sum()) * cell * cell)


@lru_cache
def describe_distance(settings: MaskSettings, image_size: int) -> str:
    """Return the AvgDist of the masks of some settings as text, with the paper's good range.

    Args:
        settings: the mask settings of a recipe.
        image_size: side of the square images in pixels.
    """
    generator = MaskGenerator.from_settings(settings, (image_size, image_size))
    distances = image_size**2 * generator.grid[1]  # computed per image
    count = min(256, 1 + 2**26 // distances)
    stream = torch.Generator().manual_seed(0)
    masks = torch.stack([generator(stream) for _ in range(count)])
    distance = average_distance(masks, settings.cell)
    low, high = GOOD_DISTANCES
    relation = "within" if low <= distance <= high else "outside"
    return (
        f"AvgDist {distance:.1f} pixels: {relation} the paper's good range {low} to {high} "
        "(for images of 192 pixels)"
    )


def _squared_distance_to_cells(count: int, cell: int) -> Tensor:
    """Return the squared distance along an axis from pixels to cells, (pixels, cells)."""
    pixel = torch.arange(count * cell, dtype=torch.float32)[:, None]
    first = torch.arange(count, dtype=torch.float32) * cell
    outside = torch.maximum(first - pixel, pixel - (first + cell - 1))
    return outside.clamp(min=0).square()


def enlarge_mask(mask: Tensor, factor: int) -> Tensor:
    """Repeat each value of (batch, rows, columns) over ``factor`` x ``factor`` finer cells."""
    finer = mask[:, :, None, :, None].expand(-1, -1, factor, -1, factor)
    return rearrange(finer, "batch row i column j -> batch (row i) (column j)")


def _widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices without it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
