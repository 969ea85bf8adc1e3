"""Labelled images that the project draws itself: textured shapes before soft backgrounds.

The class is the shape. Its colours, texture, size and place, and the background, say nothing about
it, so that telling classes apart takes more than a colour histogram.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simmim.data.order.randomness import numpy_stream

SMALLEST_SIZE = 16
PIXELS_AT_ONCE = 2**17
"""Images are drawn together as long as they have no more pixels than this."""

NUM_DRAWS = 40
"""Random numbers that an image may use."""

Array = np.ndarray[Any, np.dtype[np.float32]]
Shape = Callable[[Array, Array], Array]
"""Signed distance to an outline that fits the unit circle: (up, right) → negative inside."""


def draw_images(folder: Path, *, count: int, size: int, seed: int) -> None:
    """Draw images into ``folder/CLASS/NUMBER.png``, the classes equally often.

    An image depends on the seed, the size and its number alone. Files that are there and equal stay
    untouched, so that drawing the same again completes an interrupted drawing.

    Args:
        folder: where to; made where it is missing.
        count: number of images.
        size: side in pixels.
        seed: another seed draws other images.

    Raises:
        ValueError: a size or count that cannot be drawn, or other files in the folder.
    """
    if count < 1:
        raise ValueError(f"count is {count}; draw at least 1 image.")
    if size < SMALLEST_SIZE:
        raise ValueError(
            f"size is {size} pixels; shapes are told apart from {SMALLEST_SIZE} pixels on."
        )
    names = list(SHAPES)
    paths = [folder / names[number % len(names)] / f"{number:06d}.png" for number in range(count)]
    _refuse_others(folder, set(paths))
    for name in names[:count]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    at_once = max(1, PIXELS_AT_ONCE // size**2)
    for place, name in enumerate(names):
        numbers = range(place, count, len(names))
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            for number, pixels in zip(part, render(name, part, size, seed), strict=True):
                _write(paths[number], pixels)


def _refuse_others(folder: Path, expected: set[Path]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the images.")
    for path in folder.rglob("*"):
        if path not in expected and not path.is_dir():
            raise ValueError(
                f"{folder} holds {path.relative_to(folder)}, which is not to be drawn there: give "
                "a new or empty folder, or remove it."
            )


def _write(path: Path, pixels: np.ndarray) -> None:
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG", compress_level=1)
    data = encoded.getvalue()
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


def render(shape: str, numbers: Sequence[int], size: int, seed: int) -> np.ndarray:
    """Return images showing a shape.

    Args:
        shape: one of ``SHAPES``.
        numbers: which images of the endless sequence of this seed.
        size: side in pixels.
        seed: names the sequence.

    Returns:
        uint8 (len(numbers), size, size, 3).
    """
    draws = _Draws(numbers, seed)
    axis: Array = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
    x, y = axis[None, None, :], axis[None, :, None]

    # Nearly in the middle and nearly upright: what is hidden follows from what the shape is, and
    # not only from the colours around, so that filling it in takes knowing the shape.
    radius = draws.between(0.7, 0.95)
    right, down = draws.between(-0.1, 0.1), draws.between(-0.1, 0.1)
    lean = draws.between(-0.25, 0.25)
    inside = _turn((down - y) / radius, (x - right) / radius, lean)
    distance = SHAPES[shape](*inside) * radius * (size / 2)  # in pixels
    cover = np.clip(0.5 - distance, 0, 1)

    channels = []
    background, texture = _background(x, y, draws), _texture(x, y, draws)
    for _ in range(3):
        ground = draws.between(0.0, 1.0)
        figure = (ground + draws.between(0.3, 0.7)) % 1  # 0.3 or more away, on either side
        ground = ground + draws.between(-0.2, 0.2) * background
        figure = figure + draws.between(-0.3, 0.3) * texture
        channels.append(ground + (figure - ground) * cover)
    images: np.ndarray = np.rint(np.stack(channels, axis=-1).clip(0, 1) * 255)
    return images.astype(np.uint8)


class _Draws:
    """Random numbers of several images side by side, each image with a stream of its own."""

    def __init__(self, numbers: Sequence[int], seed: int) -> None:
        streams = [numpy_stream("procedural image", seed, number) for number in numbers]
        draws = np.stack([stream.random(NUM_DRAWS) for stream in streams], axis=1)
        self._rows = iter(draws.astype(np.float32)[:, :, None, None])

    def between(self, low: float, high: float) -> Array:
        """Return a number for each image, (images, 1, 1)."""
        numbers: Array = np.float32(low) + next(self._rows) * np.float32(high - low)
        return numbers


def _turn(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _background(x: Array, y: Array, draws: _Draws) -> Array:
    """Return slow waves in two directions, from a gradient to a few clouds; -1 to 1."""
    waves = []
    for _ in range(2):
        along, _ = _turn(x, y, draws.between(0, 2 * np.pi))
        waves.append(np.sin(along * draws.between(0.5, 4) + draws.between(0, 2 * np.pi)))
    wave: Array = (waves[0] + waves[1]) / 2
    return wave


def _texture(x: Array, y: Array, draws: _Draws) -> Array:
    """Return stripes, checks, dots or nothing, -1 to 1."""
    along, across = _turn(x, y, draws.between(0, np.pi))
    frequency = draws.between(6, 14)  # 2 to 4.5 periods across the image
    first = np.sin(along * frequency + draws.between(0, 2 * np.pi))
    second = np.sin(across * frequency + draws.between(0, 2 * np.pi))
    kind = draws.between(0, 4).astype(np.int64)
    kinds = [first * 2, first * second * 3, first + second - 0.8, 0 * first]
    wave: Array = np.clip(np.choose(kind, kinds) * 2, -1, 1)
    return wave


def _polygon(x: Array, y: Array, sides: int) -> Array:
    """Signed distance to the sides of a regular polygon."""
    outermost = np.full_like(x, -np.inf)
    for side in range(sides):
        angle = 2 * np.pi * side / sides
        outermost = np.maximum(outermost, x * np.cos(angle) + y * np.sin(angle))
    distance: Array = outermost - np.float32(np.cos(np.pi / sides))
    return distance


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    distance: Array = np.maximum(
        np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height)
    )
    return distance


def disc(x: Array, y: Array) -> Array:
    """Signed distance to a disc."""
    distance: Array = np.hypot(x, y) - np.float32(0.85)
    return distance


def ring(x: Array, y: Array) -> Array:
    """Signed distance to a disc with a hole."""
    distance: Array = np.abs(np.hypot(x, y) - np.float32(0.75)) - np.float32(0.25)
    return distance


def square(x: Array, y: Array) -> Array:
    """Signed distance to a square."""
    return _box(x, y, 0.75, 0.75)


def triangle(x: Array, y: Array) -> Array:
    """Signed distance to a triangle of equal sides."""
    return _polygon(-x, y, 3)


def cross(x: Array, y: Array) -> Array:
    """Signed distance to a cross of two bars."""
    distance: Array = np.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0))
    return distance


def star(x: Array, y: Array) -> Array:
    """Signed distance to a star of five points."""
    sector = 2 * np.pi / 5
    angle = np.abs(np.mod(np.arctan2(y, x), sector) - sector / 2)  # 0 in the notch, most at a tip
    radius = np.hypot(x, y)
    tip_x, tip_y = np.cos(sector / 2), np.sin(sector / 2)
    edge_x, edge_y = tip_x - 0.4, tip_y  # from the notch at (0.4, 0) to the tip
    length = np.hypot(edge_x, edge_y)
    beyond = (radius * np.cos(angle) - 0.4) * edge_y - radius * np.sin(angle) * edge_x
    distance: Array = (beyond / length).astype(np.float32)
    return distance


def crescent(x: Array, y: Array) -> Array:
    """Signed distance to a disc that another disc has bitten into."""
    bite = np.hypot(x - np.float32(0.45), y) - np.float32(0.7)
    distance: Array = np.maximum(np.hypot(x, y) - np.float32(0.95), -bite)
    return distance


def hourglass(x: Array, y: Array) -> Array:
    """Signed distance to two triangles that touch."""
    sides = (np.abs(y) - np.abs(x) - np.float32(0.1)) * np.float32(np.sqrt(0.5))
    distance: Array = np.maximum(sides, np.abs(x) - np.float32(0.8))
    return distance


SHAPES: dict[str, Shape] = {
    shape.__name__: shape
    for shape in (disc, ring, square, triangle, cross, star, crescent, hourglass)
}
"""The classes."""
