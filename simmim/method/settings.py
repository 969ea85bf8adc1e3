"""Settings of mask cells and of the loss, and the grid of mask cells. Imports no torch."""

import math
from typing import Annotated, Literal

from data_prep.bounds import Bounds, Count
from simmim.recipe import settings

LossName = Literal["l1", "smooth_l1", "l2"]
LossArea = Literal["masked", "all"]
TargetName = Literal["pixels", "normalised_pixels", "features"]

Grid = tuple[int, int]
"""Rows and columns, of mask cells or of pixels."""


@settings
class CellSettings:
    """The cells of a mask, and how many of them are hidden."""

    cell: Count = 32
    """Side of a mask cell in pixels: a multiple of the patch size that divides the image size."""

    ratio: Annotated[float, Bounds(gt=0, lt=1)] = 0.6
    """Fraction of the mask cells to hide, between 0 and 1; rounded up to whole cells."""

    def grid(self, image_size: Grid, patch_size: int = 1) -> Grid:
        """Return (rows, columns) of mask cells of an image of this height and width in pixels.

        Args:
            image_size: height and width in pixels.
            patch_size: side of a patch in pixels, of which cells have to be multiples.

        Raises:
            ValueError: the cells cut through patches, do not tile the image, or none would stay
                visible; names those that would do.
        """
        if self.cell % patch_size:
            fitting = _fitting_cells(image_size, self.cell, patch_size, self.ratio)
            raise ValueError(
                f"mask.cell {self.cell} is not a multiple of encoder.patch_size {patch_size}, so "
                f"that cells would cut through patches: choose {fitting}."
            )
        grid = mask_grid(image_size, self.cell, patch_size, ratio=self.ratio)
        if _hides_all(grid, self.ratio):
            choices = ["a larger image size"]
            sides = _legal_sides(image_size, patch_size, self.ratio)
            if smaller := [side for side in sides if side < self.cell]:
                choices.insert(0, _as_cells(smaller))
            if (cells := math.prod(grid)) > 1:  # the ratio is rounded down to three digits
                ratio = math.floor(1000 - 1000 / cells) / 1000
                choices.insert(0, f"a ratio of at most {ratio:g}")
            raise ValueError(
                f"mask ratio {self.ratio} hides all of the {grid[0]}x{grid[1]} mask cells of an "
                f"image: choose {' or '.join(choices)}."
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
    """Normalise each target pixel by the mean and variance of its 47x47 neighbourhood: the target
    `normalised_pixels`."""
    target: TargetName | None = None
    """What is predicted: `pixels`, `normalised_pixels`, or `features` of a frozen encoder: its last
    map, each token normalised to mean 0 and variance 1, which is not drawn. null is pixels, as
    norm_target says."""
    target_encoder: str | None = None
    """For features: the encoder directory, or the finished run, of the frozen encoder."""

    def __post_init__(self) -> None:
        if self.norm_target and self.target not in (None, "normalised_pixels"):
            raise ValueError(
                f"norm_target is true and target is {self.target}: leave one of them out."
            )
        if self.target == "features" and self.target_encoder is None:
            raise ValueError("target is features: name their encoder directory in target_encoder.")
        if self.target != "features" and self.target_encoder is not None:
            raise ValueError(
                f"target_encoder is {self.target_encoder}: set target to features to predict its "
                "features, or leave it out."
            )

    @property
    def target_name(self) -> TargetName:
        """The target, by its name."""
        return self.target or ("normalised_pixels" if self.norm_target else "pixels")


def mask_grid(
    image_size: Grid, cell: int, patch_size: int = 1, *, ratio: float | None = None
) -> Grid:
    """Return (rows, columns) of mask cells of an image of this height and width in pixels.

    Args:
        image_size: height and width in pixels.
        cell: side of a mask cell in pixels.
        patch_size: side of a patch in pixels, of which the cells that are named are multiples.
        ratio: share of the cells to hide, of which the cells that are named leave some visible;
            None for any.

    Raises:
        ValueError: the cells do not tile the image; names the sides that would.
    """
    height, width = image_size
    if cell < 1 or height % cell or width % cell:
        raise ValueError(
            f"mask cells of {cell} pixels do not divide an image of {height}x{width} pixels: "
            f"choose {_fitting_cells(image_size, cell, patch_size, ratio)}."
        )
    return height // cell, width // cell


def _fitting_cells(image_size: Grid, cell: int, patch_size: int, ratio: float | None) -> str:
    """Return the cells that an image can be masked by; if there are none, its sizes for a cell."""
    sides = [side for side in _legal_sides(image_size, patch_size, ratio) if side > 1]
    if sides:
        return f"{_as_cells(sides)}, or another image size"
    whole = -(-max(cell, 1) // patch_size) * patch_size
    other = "" if whole == cell else f"a cell of {whole} pixels and "
    return f"{other}an image size that is a multiple of {whole} pixels"


def _legal_sides(image_size: Grid, patch_size: int, ratio: float | None) -> list[int]:
    """Return the sides of cells of whole patches that tile an image and leave some visible."""
    height, width = image_size
    common = math.gcd(height, width)
    sides = [side for side in range(patch_size, common + 1, patch_size) if common % side == 0]
    if ratio is None:
        return sides
    return [side for side in sides if not _hides_all((height // side, width // side), ratio)]


def _as_cells(sides: list[int]) -> str:
    return f"a cell of {', '.join(map(str, sides))} pixels"


def _hides_all(grid: Grid, ratio: float) -> bool:
    return hidden_count(grid, ratio) == math.prod(grid)


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
