"""A small recipe, for the tests of recipes and settings."""

from pathlib import Path
from typing import Literal

from simmim.recipe import (
    load,
    settings,
)


@settings
class Inner:
    """A part."""

    rate: float = 0.5
    """Share, from 0 to 1."""
    sizes: tuple[int, ...] = (1, 2)
    """Some sizes in pixels."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; it must be from 0 to 1.")


@settings
class Whole:
    """A recipe."""

    batch_size: int
    """Images a step."""
    kind: Literal["one", "two"] = "one"
    """One or two."""
    name: str = "none"
    """What it is called."""
    limit: float | None = None
    """Limit in steps; null is none."""
    shuffle: bool = True
    """Whether to shuffle."""
    inner: Inner = Inner()
    """Its part."""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *overrides: str) -> Whole:
    return load(Whole, write(folder, text), overrides)
