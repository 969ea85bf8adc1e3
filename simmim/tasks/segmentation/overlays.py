"""Pictures of labels and predictions over images, with a legend."""

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.format.atomic import atomic_write_bytes
from data_prep.images.display import to_display
from simmim.data.loader.batch import Batch
from simmim.data.transforms.labels import IGNORED

GAP = 6
HEADER = 20
ENTRY = 18
"""Height of a line of the legend in pixels."""

PAPER, INK = (255, 255, 255), (40, 40, 40)
OPACITY = 0.7


def palette(count: int) -> np.ndarray:
    """Return distinct colours, uint8 (count, 3), with hues spaced by the golden ratio."""
    return np.array(
        [
            [
                round(255 * part)
                for part in colorsys.hsv_to_rgb(
                    number * 0.618034 % 1.0, (0.85, 0.55)[number // 2 % 2], (1.0, 0.75)[number % 2]
                )
            ]
            for number in range(count)
        ],
        dtype=np.uint8,
    ).reshape(-1, 3)


def picture_of(
    batch: Batch, row: int, size: tuple[int, ...], bands: Sequence[int] | None
) -> np.ndarray:
    """Return an image of a batch as uint8 RGB (rows, columns, 3), resized to `size`."""
    return _picture(batch.images[row], size, bands)


def square_picture_of(
    batch: Batch, row: int, size: tuple[int, int], bands: Sequence[int] | None
) -> np.ndarray:
    """Return an image that was padded to a square, without the padding, resized to `size`."""
    square = batch.images[row]
    factor = square.shape[-1] / max(size)
    rows, columns = (max(1, round(length * factor)) for length in size)
    return _picture(square[:, :rows, :columns], size, bands)


def _picture(image: Tensor, size: tuple[int, ...], bands: Sequence[int] | None) -> np.ndarray:
    drawn = Image.fromarray(to_display(image.cpu().numpy().transpose(1, 2, 0), bands))
    return np.asarray(drawn.resize((size[1], size[0])))


def draw_objects(
    pixels: np.ndarray,
    boxes: Sequence[Sequence[float]],
    masks: Sequence[np.ndarray | None],
    colours: np.ndarray,
) -> np.ndarray:
    """Draw the masks and boxes of objects over an image.

    Args:
        pixels: uint8 (rows, columns, 3).
        boxes: left, top, width and height of each.
        masks: bool (rows, columns) of each, or None.
        colours: uint8 (objects, 3).
    """
    painted = pixels.astype(np.float32)
    for mask, colour in zip(masks, colours, strict=True):
        if mask is not None:
            painted[mask] = (1 - OPACITY) * painted[mask] + OPACITY * colour
    image = Image.fromarray(painted.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for (left, top, width, height), colour in zip(boxes, colours, strict=True):
        right, bottom = max(left, left + width - 1), max(top, top + height - 1)
        draw.rectangle((left, top, right, bottom), outline=tuple(colour.tolist()), width=2)
    return np.array(image)


def paint_classes(pixels: np.ndarray, classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blend class colours over an image in grey, so that they match the legend.

    Ignored pixels stay dark.

    Args:
        pixels: uint8 (rows, columns, 3).
        classes: uint8 (rows, columns), or IGNORED.
        colours: uint8 (classes, 3).
    """
    known = classes != IGNORED
    over = np.zeros_like(pixels)
    over[known] = colours[classes[known]]
    grey = pixels.mean(axis=2, keepdims=True, dtype=np.float32)
    mixed: np.ndarray = (1 - OPACITY) * grey + OPACITY * over
    painted: np.ndarray = mixed.round().astype(np.uint8)
    return painted


def write_panel(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    legend: Sequence[tuple[str, np.ndarray]],
    path: Path,
) -> None:
    """Write rows of images (uint8, rows x columns x 3) with captions and a legend as a PNG.

    Args:
        rows: one image per caption in each; images in a row have the same size.
        captions: captions of the columns.
        legend: names and colours.
        path: the file, replaced atomically; its folder is created if missing.
    """
    widths = [max(row[place].shape[1] for row in rows) for place in range(len(captions))]
    total = max(sum(widths) + GAP * (len(widths) + 1), 240)
    lines = _lines(legend, total)
    height = HEADER + sum(row[0].shape[0] + GAP for row in rows) + ENTRY * len(lines) + GAP
    panel = Image.new("RGB", (total, height), PAPER)
    draw = ImageDraw.Draw(panel)
    left = GAP
    for width, caption in zip(widths, captions, strict=True):
        draw.text((left, 4), caption, INK, ImageFont.load_default(12))
        left += width + GAP
    top = HEADER
    for row in rows:
        left = GAP
        for width, tile in zip(widths, row, strict=True):
            panel.paste(Image.fromarray(tile), (left, top))
            left += width + GAP
        top += row[0].shape[0] + GAP
    for line in lines:
        for left, name, colour in line:
            draw.rectangle((left, top + 3, left + 12, top + 15), tuple(colour.tolist()), INK)
            draw.text((left + 17, top + 2), name, INK, ImageFont.load_default(12))
        top += ENTRY
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    panel.save(encoded, format="PNG", optimize=True)
    atomic_write_bytes(path, encoded.getvalue())


def _lines(
    legend: Sequence[tuple[str, np.ndarray]], width: int
) -> list[list[tuple[int, str, np.ndarray]]]:
    """Break a legend into lines of entries, each with its x position."""
    font = ImageFont.load_default(12)
    lines: list[list[tuple[int, str, np.ndarray]]] = []
    left = width
    for name, colour in legend:
        needed = 17 + int(font.getlength(name)) + 14
        if left + needed > width:
            lines.append([])
            left = GAP
        lines[-1].append((left, name, colour))
        left += needed
    return lines
