"""Settings of masking and of the loss, and the grid of mask cells. Imports no torch."""

import math
from typing import Literal

from simmim.recipe import settings

Strategy = Literal["random", "square", "block"]
LossName = Literal["l1", "smooth_l1", "l2"]
LossArea = Literal["masked", "all"]

Grid = tuple[int, int]
"""Rows and columns, of mask cells or of pixels."""


@settings
class MaskSettings:
    """Which part of an image is masked during pretraining."""

    cell: int = 32
    """Side of a mask cell in pixels: a multiple of the patch size that divides the image size."""

    ratio: float = 0.6
    """Fraction of the mask cells to hide, between 0 and 1; rounded up to whole cells."""

    strategy: Strategy = "random"
    """How masked cells are drawn: `random` cells, one `square`, or `block` (block-wise masking as
    in BEiT)."""

    def __post_init__(self) -> None:
        if self.cell < 1:
            raise ValueError(f"cell is {self.cell} pixels; it must be at least 1.")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}; it must be between 0 and 1, such as 0.6.")

    def grid(self, image_size: Grid) -> Grid:
        """Return (rows, columns) of mask cells of an image of this height and width in pixels.

        Raises:
            ValueError: the cells do not tile the image, or no cell would stay visible.
        """
        grid = mask_grid(image_size, self.cell)
        if hidden_count(grid, self.ratio) == math.prod(grid):
            raise ValueError(
                f"mask ratio {self.ratio} hides all of the {grid[0]}x{grid[1]} mask cells of an "
                f"image: lower the ratio, or choose cells smaller than {self.cell} pixels."
            )
        return grid


@settings
class LossSettings:
    """The prediction target and the loss."""

    name: LossName = "l1"
    """Loss per pixel: `l1`, `smooth_l1` or `l2`."""
    area: LossArea = "masked"
    """Pixels that the loss is averaged over: `masked` or `all`."""
    norm_target: bool = False
    """Normalise each target pixel by the mean and variance of its 47x47 neighbourhood."""


def mask_grid(image_size: Grid, cell: int, patch_size: int = 1) -> Grid:
    """Return (rows, columns) of mask cells of an image of this height and width in pixels.

    Args:
        image_size: height and width in pixels.
        cell: side of a mask cell in pixels.
        patch_size: side of a patch in pixels, of which the cells that are named are multiples.

    Raises:
        ValueError: the cells do not tile the image; names the sides that would.
    """
    height, width = image_size
    if cell < 1 or height % cell or width % cell:
        common = math.gcd(height, width)
        legal = [side for side in range(patch_size, common + 1, patch_size) if common % side == 0]
        sides = ", ".join(str(side) for side in legal if side > 1)
        remedy = (
            f"a cell of {sides} pixels, or another image size"
            if sides
            else (f"an image size that is a multiple of {max(cell, patch_size)} pixels")
        )
        raise ValueError(
            f"mask cells of {cell} pixels do not divide an image of {height}x{width} pixels: "
            f"choose {remedy}."
        )
    return height // cell, width // cell


def hidden_count(grid: Grid, ratio: float) -> int:
    """Return how many cells of a grid are hidden: ceil(ratio x cells).

    Raises:
        ValueError: an empty grid, or a ratio outside 0 to 1.
    """
    if min(grid) < 1:
        raise ValueError(f"the grid of mask cells is {grid[0]}x{grid[1]}; both must be at least 1.")
    if not 0 <= ratio <= 1:
        raise ValueError(f"the mask ratio is {ratio}; it must be between 0 and 1.")
    # 0.55 * 100 is 55.00000000000001 in binary, and means 55.
    return math.ceil(ratio * math.prod(grid) - 1e-9)
