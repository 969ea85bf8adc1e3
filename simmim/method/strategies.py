"""Mask strategies: how the hidden cells are drawn, and the settings of each. Imports no torch.

A strategy is a class here. To add one, add its name to `Strategy`, a line to `MaskSettings.chosen`
and, if it has settings, a section of its name to `MaskSettings`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from data_prep.bounds import Fraction, Span
from simmim.method.settings import CellSettings, Grid
from simmim.recipe import settings

Strategy = Literal["random", "square", "block"]


class Draws(Protocol):
    """A source of random numbers."""

    def uniform(self) -> float:
        """Return a number from 0 to below 1."""

    def uniforms(self, count: int) -> NDArray[np.floating[Any]]:
        """Return numbers from 0 to below 1."""

    def integer(self, below: int) -> int:
        """Return an integer from 0 to below `below`."""


class MaskStrategy(Protocol):
    """Draws masks; frozen and picklable, so that data workers can."""

    def draw(self, grid: Grid, hidden: int, draws: Draws) -> NDArray[np.bool_]:
        """Return one mask.

        Args:
            grid: rows and columns of mask cells.
            hidden: number of cells to hide, exactly.
            draws: random numbers.

        Returns:
            (rows, columns), True = hidden.
        """


@dataclass(frozen=True)
class RandomMask:
    """Cells drawn uniformly without replacement (SimMIM, section 3.2)."""

    def draw(self, grid: Grid, hidden: int, draws: Draws) -> NDArray[np.bool_]:
        """Return one mask; see `MaskStrategy`."""
        mask = np.zeros(math.prod(grid), dtype=bool)
        mask[draws.uniforms(len(mask)).argsort(kind="stable")[:hidden]] = True
        return mask.reshape(grid)


@dataclass(frozen=True)
class SquareMask:
    """One square at a random position.

    To hide the exact count, it is the box closest to a square that contains as many cells, with its
    last column (or last row, if the grid is too narrow for a square) partly hidden.
    """

    def draw(self, grid: Grid, hidden: int, draws: Draws) -> NDArray[np.bool_]:
        """Return one mask; see `MaskStrategy`."""
        rows, columns = grid
        mask = np.zeros(grid, dtype=bool)
        if not hidden:
            return mask
        height = min(rows, round(math.sqrt(hidden)))
        width = math.ceil(hidden / height)
        if width <= columns:
            box = (np.arange(height * width) < hidden).reshape(width, height).T
        else:
            height = math.ceil(hidden / columns)
            box = (np.arange(height * columns) < hidden).reshape(height, columns)
        height, width = box.shape
        top, left = draws.integer(rows - height + 1), draws.integer(columns - width + 1)
        mask[top : top + height, left : left + width] = box
        return mask


@settings
class BlockMask:
    """Blocks of random area and aspect ratio that may overlap (BEiT, algorithm 1).

    Blocks are added until the count is reached. One that would hide too many cells is redrawn; the
    last cells are added at the border of the hidden region.
    """

    smallest: Fraction = 0.2
    """Area of the smallest block, as a fraction of the cells to hide, above 0 and at most 1; BEiT's
    is 16 of 75 cells."""
    aspect: Annotated[tuple[float, float], Span()] = (0.3, 1 / 0.3)
    """Range of the aspect ratio (height / width) of a block."""

    def draw(self, grid: Grid, hidden: int, draws: Draws) -> NDArray[np.bool_]:
        """Return one mask; see `MaskStrategy`."""
        mask = np.zeros(grid, dtype=bool)
        smallest = max(1, int(self.smallest * hidden))
        remaining, attempts = hidden, 0
        while remaining >= smallest and attempts < 10:
            block = self._place(mask, smallest, remaining, draws)
            new = int((~block).sum())
            attempts += 1
            if 0 < new <= remaining:
                block[:] = True
                remaining, attempts = remaining - new, 0
        for _ in range(remaining):
            edge = np.argwhere(_edge(mask))
            row, column = edge[draws.integer(len(edge))]
            mask[row, column] = True
        return mask

    def _place(
        self, mask: NDArray[np.bool_], smallest: int, largest: int, draws: Draws
    ) -> NDArray[np.bool_]:
        """Return a block of a mask, of an area between two numbers of cells: a view."""
        rows, columns = mask.shape
        area = smallest + draws.uniform() * (largest - smallest)
        low, high = (math.log(aspect) for aspect in self.aspect)
        aspect = math.exp(low + draws.uniform() * (high - low))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = draws.integer(rows - height + 1), draws.integer(columns - width + 1)
        return mask[top : top + height, left : left + width]


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the visible cells next to a hidden one; all cells if none is hidden."""
    edge = np.zeros_like(mask)
    edge[1:] |= mask[:-1]
    edge[:-1] |= mask[1:]
    edge[:, 1:] |= mask[:, :-1]
    edge[:, :-1] |= mask[:, 1:]
    edge &= ~mask
    return edge if edge.any() else ~mask


@settings
class MaskSettings(CellSettings):
    """Which part of an image is masked during pretraining."""

    strategy: Strategy = "random"
    """How masked cells are drawn: `random` cells, one `square`, or `block` (block-wise masking as
    in BEiT)."""
    block: BlockMask | None = None
    """Settings of the strategy block; null is BEiT's."""

    def __post_init__(self) -> None:
        for name in get_args(Strategy):
            if name != self.strategy and getattr(self, name, None) is not None:
                raise ValueError(
                    f"{name} has the settings of the strategy {name}, and strategy is "
                    f"{self.strategy}: leave one of them out, or set strategy to {name}."
                )

    @property
    def chosen(self) -> MaskStrategy:
        """The strategy, with its settings."""
        match self.strategy:
            case "random":
                return RandomMask()
            case "square":
                return SquareMask()
            case "block":
                return self.block or BlockMask()
