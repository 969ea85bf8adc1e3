"""Contact sheet: samples of a set drawn as one picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_prep.format.atomic import atomic_write_bytes, remove_leftovers
from data_prep.format.index import read_images, read_index
from data_prep.format.manifest import Manifest
from data_prep.format.text import count_noun, printable
from data_prep.images.checking import RejectedImageError, read_pixels
from data_prep.images.display import to_display
from data_prep.images.settings import read_limit
from data_prep.inspect.info import spread_rows
from data_prep.inspect.pixels import stored_form

_COLUMNS, _ROWS = 8, 6
_SIDE = 160
_GAP = 8
_CAPTION = 18
_PAPER, _INK, _EMPTY = "white", "#202020", "#e0e0e0"


def draw_contact_sheet(manifest: Manifest, path: Path, bands: Sequence[int] | None = None) -> int:
    """Draw samples evenly spread over the set as a PNG, each with its class name or its key.

    Arrays are stretched from the 1st to the 99th percentile.

    Args:
        manifest: manifest of the set.
        path: file to write.
        bands: three channels that are drawn in red, green and blue, or one in grey; None: the first
            three, or the first of fewer.

    Returns:
        The largest number of channels of the images drawn, 0 if none can be decoded.

    Raises:
        ValueError: no image has all of these bands.
        ManifestError: an index is missing or does not fit.
        OSError: a shard cannot be read, or the picture cannot be written.
    """
    rows = spread_rows([shard.samples for shard in manifest.shards], _COLUMNS * _ROWS)
    limit = read_limit(manifest.options)
    tiles: list[tuple[Image.Image, str]] = []
    found: list[int] = []
    for shard, chosen in zip(manifest.shards, rows, strict=True):
        if not len(chosen):
            continue
        index = read_index(manifest.folder, shard)
        images = read_images(shard.location(manifest.folder), index, chosen)
        for row, data in zip(chosen, images, strict=True):
            label = int(index.labels[row])
            named = 0 <= label < len(manifest.classes)
            caption = manifest.classes[label] if named else str(index.keys[row])
            values = _read(data, str(index.extensions[row]), limit)
            found += [] if values is None else [values.shape[-1]]
            tiles.append((_draw_tile(values, bands), caption))
    most = max(found, default=0)
    if found and bands is not None and max(bands) >= most:
        raise ValueError(
            f"--bands: the images in {manifest.folder} have at most {count_noun(most, 'band')}, "
            f"counted from 0, got {' '.join(map(str, bands))}."
        )
    buffer = io.BytesIO()
    _lay_out(tiles).save(buffer, format="PNG")
    remove_leftovers(path.parent, path.name)
    atomic_write_bytes(path, buffer.getvalue())
    return most


def _read(data: bytes, extension: str, max_pixels: int) -> NDArray[Any] | None:
    """Return the values of an image, (rows, columns, channels); None if it cannot be decoded."""
    try:
        stored = stored_form(data, extension, max_pixels=max_pixels)
        return read_pixels(*stored, max_pixels=max_pixels)
    except RejectedImageError:
        return None


def _draw_tile(values: NDArray[Any] | None, bands: Sequence[int] | None) -> Image.Image:
    if values is None:
        return _empty_tile("cannot be decoded")
    if bands is not None and max(bands) >= values.shape[-1]:
        return _empty_tile(f"has only {count_noun(values.shape[-1], 'band')}")
    picture = Image.fromarray(to_display(values, bands))
    return ImageOps.contain(picture, (_SIDE, _SIDE), Image.Resampling.LANCZOS)


def _empty_tile(reason: str) -> Image.Image:
    tile = Image.new("RGB", (_SIDE, _SIDE), _EMPTY)
    draw = ImageDraw.Draw(tile)
    draw.text((_SIDE / 2, _SIDE / 2), reason, fill=_INK, anchor="mm")
    return tile


def _lay_out(tiles: list[tuple[Image.Image, str]]) -> Image.Image:
    columns = min(_COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    step_x, step_y = _SIDE + _GAP, _SIDE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, lines * step_y + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for number, (tile, caption) in enumerate(tiles):
        left = _GAP + number % columns * step_x
        top = _GAP + number // columns * step_y
        place = (left + (_SIDE - tile.width) // 2, top + (_SIDE - tile.height) // 2)
        sheet.paste(tile, place)
        text = _shorten(printable(caption), font)
        draw.text((left + _SIDE / 2, top + _SIDE + 3), text, fill=_INK, font=font, anchor="mt")
    return sheet


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the text, truncated to the width of a tile."""
    shown = text
    while font.getlength(shown) > _SIDE and len(shown) > 1:
        shown = shown[:-2].rstrip("…") + "…"
    return shown
