"""Procedurally drawn labelled images: textured shapes on smooth backgrounds.

The class is the shape. Colours, texture, size, position and background are independent of it, so
that classification needs more than a colour histogram.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simmim.data.order.randomness import numpy_stream

MIN_SIZE = 16
BATCH_PIXELS = 2**17
"""Maximum number of pixels of images that are drawn together."""

NUM_DRAWS = 40
"""Maximum number of random numbers per image."""

Array = NDArray[np.float32]
Shape = Callable[[Array, Array], Array]
"""Signed distance function of an outline in the unit circle: (up, right) → negative inside."""


def draw_images(folder: Path, *, count: int, size: int, seed: int) -> None:
    """Draw images to ``folder/CLASS/NUMBER.png``, with balanced classes.

    An image depends only on the seed, the size and its number. Identical existing files are left
    untouched, so repeating a call completes an interrupted one.

    Args:
        folder: output folder, created if missing.
        count: number of images.
        size: side in pixels.
        seed: random seed.

    Raises:
        ValueError: an invalid size or count, or other files in the folder.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1 image.")
    if size < MIN_SIZE:
        raise ValueError(
            f"size is {size} pixels; it must be at least {MIN_SIZE} for shapes to be recognisable."
        )
    names = list(SHAPES)
    paths = [folder / names[number % len(names)] / f"{number:06d}.png" for number in range(count)]
    _refuse_others(folder, set(paths))
    for name in names[:count]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    batch = max(1, BATCH_PIXELS // size**2)
    for label, name in enumerate(names):
        numbers = range(label, count, len(names))
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
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
                f"{folder} contains {path.relative_to(folder)}, which is not one of the images:"
                " give a new or empty folder, or remove the file."
            )


def _write(path: Path, pixels: NDArray[np.uint8]) -> None:
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG", compress_level=1)
    data = encoded.getvalue()
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


def render(shape: str, numbers: Sequence[int], size: int, seed: int) -> NDArray[np.uint8]:
    """Return images of a shape.

    Args:
        shape: one of ``SHAPES``.
        numbers: numbers of the images, in the endless sequence of this seed.
        size: side in pixels.
        seed: random seed.

    Returns:
        uint8 (len(numbers), size, size, 3).
    """
    draws = _Draws(numbers, seed)
    axis: Array = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
    x, y = axis[None, None, :], axis[None, :, None]

    # Almost centred and upright, so that masked parts follow from the shape and not only from the
    # surrounding colours: predicting them takes knowledge of the shape.
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
        figure = (ground + draws.between(0.3, 0.7)) % 1  # differs by at least 0.3
        ground = ground + draws.between(-0.2, 0.2) * background
        figure = figure + draws.between(-0.3, 0.3) * texture
        channels.append(ground + (figure - ground) * cover)
    images: NDArray[np.float32] = np.rint(np.stack(channels, axis=-1).clip(0, 1) * 255)
    return images.astype(np.uint8)


class _Draws:
    """Random numbers of several images, each with its own stream."""

    def __init__(self, numbers: Sequence[int], seed: int) -> None:
        streams = [numpy_stream("procedural image", seed, number) for number in numbers]
        draws = np.stack([stream.random(NUM_DRAWS) for stream in streams], axis=1)
        self._rows = iter(draws.astype(np.float32)[:, :, None, None])

    def between(self, low: float, high: float) -> Array:
        """Return one number per image, (images, 1, 1)."""
        numbers: Array = np.float32(low) + next(self._rows) * np.float32(high - low)
        return numbers


def _turn(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _background(x: Array, y: Array, draws: _Draws) -> Array:
    """Return the sum of two low-frequency waves, -1 to 1."""
    waves = []
    for _ in range(2):
        along, _ = _turn(x, y, draws.between(0, 2 * np.pi))
        waves.append(np.sin(along * draws.between(0.5, 4) + draws.between(0, 2 * np.pi)))
    wave: Array = (waves[0] + waves[1]) / 2
    return wave


def _texture(x: Array, y: Array, draws: _Draws) -> Array:
    """Return stripes, checks, dots or a constant, -1 to 1."""
    along, across = _turn(x, y, draws.between(0, np.pi))
    frequency = draws.between(6, 14)  # 2 to 4.5 periods across the image
    first = np.sin(along * frequency + draws.between(0, 2 * np.pi))
    second = np.sin(across * frequency + draws.between(0, 2 * np.pi))
    kind = draws.between(0, 4).astype(np.int64)
    kinds = [first * 2, first * second * 3, first + second - 0.8, 0 * first]
    wave: Array = np.clip(np.choose(kind, kinds) * 2, -1, 1)
    return wave


def _polygon(x: Array, y: Array, sides: int) -> Array:
    """Return the signed distance to the sides of a regular polygon."""
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
    """Return the signed distance to a disc."""
    distance: Array = np.hypot(x, y) - np.float32(0.85)
    return distance


def ring(x: Array, y: Array) -> Array:
    """Return the signed distance to a disc with a hole."""
    distance: Array = np.abs(np.hypot(x, y) - np.float32(0.75)) - np.float32(0.25)
    return distance


def square(x: Array, y: Array) -> Array:
    """Return the signed distance to a square."""
    return _box(x, y, 0.75, 0.75)


def triangle(x: Array, y: Array) -> Array:
    """Return the signed distance to an equilateral triangle."""
    return _polygon(-x, y, 3)


def cross(x: Array, y: Array) -> Array:
    """Return the signed distance to a cross of two bars."""
    distance: Array = np.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0))
    return distance


def star(x: Array, y: Array) -> Array:
    """Return the signed distance to a five-pointed star."""
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
    """Return the signed distance to a crescent: a disc minus another disc."""
    bite = np.hypot(x - np.float32(0.45), y) - np.float32(0.7)
    distance: Array = np.maximum(np.hypot(x, y) - np.float32(0.95), -bite)
    return distance


def hourglass(x: Array, y: Array) -> Array:
    """Return the signed distance to two touching triangles."""
    sides = (np.abs(y) - np.abs(x) - np.float32(0.1)) * np.float32(np.sqrt(0.5))
    distance: Array = np.maximum(sides, np.abs(x) - np.float32(0.8))
    return distance


SHAPES: dict[str, Shape] = {
    shape.__name__: shape
    for shape in (disc, ring, square, triangle, cross, star, crescent, hourglass)
}
"""The classes."""
