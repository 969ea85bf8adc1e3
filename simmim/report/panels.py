"""Reconstruction panels: original, masked, prediction, and prediction pasted into the original."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.format.atomic import atomic_write_bytes
from data_prep.images.display import choose_bands, stretch, stretch_limits
from simmim.method.masking import enlarge_mask

CAPTIONS = ("original", "masked", "prediction", "pasted")
SMALLEST_TILE = 128
"""Smaller images are enlarged by a whole factor until their longer side is this many pixels."""

ROWS_BEFORE_SECOND_BLOCK = 4
GAP = 4
HEADER = 22
HIDDEN_GREY = 0.5
PAPER = (255, 255, 255)
INK = (40, 40, 40)


def reconstruction_panel(
    images: Tensor,
    mask: Tensor,
    reconstruction: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    stretched: bool = False,
    bands: Sequence[int] | None = None,
    caption: str = CAPTIONS[0],
) -> None:
    """Draw inputs and reconstructions into a PNG, one row per image.

    Args:
        images: (batch, channels, height, width), normalised.
        mask: bool (batch, rows, columns) of mask cells, True = hidden.
        reconstruction: predicted pixels, same shape and normalisation as `images`.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
        path: PNG to write atomically; its folder is created if missing.
        stretched: stretch each image from the 1st to the 99th percentile of the original, as
            contact sheets of more than 8 bits are; otherwise values from 0 to 1 are drawn.
        bands: channels that are drawn in red, green and blue, or one that is drawn in grey; None
            are the first three, or the first of one or two.
        caption: caption of the originals.

    Raises:
        ValueError: the shapes do not match, or there are no images.
    """
    _check(images, mask, reconstruction, mean, std)
    images, reconstruction = images.detach().float(), reconstruction.detach().float()
    original = _bands_of(images, mean, std, bands)
    prediction = _bands_of(reconstruction, mean, std, bands)
    if stretched:
        limits = stretch_limits(original)
        original, prediction = stretch(original, *limits), stretch(prediction, *limits)
    original, prediction = original.clip(0, 1), prediction.clip(0, 1)
    hidden = enlarge_mask(mask.cpu(), images.shape[-2] // mask.shape[1])[..., None].numpy()
    masked = np.where(hidden, HIDDEN_GREY, original)
    pasted = np.where(hidden, prediction, original)
    panel = _lay_out([original, masked, prediction, pasted], (caption, *CAPTIONS[1:]))
    encoded = io.BytesIO()
    panel.save(encoded, format="PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, encoded.getvalue())


def _check(
    images: Tensor,
    mask: Tensor,
    reconstruction: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    if images.ndim != 4 or not len(images) or images.shape != reconstruction.shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)} and a reconstruction of shape "
            f"{tuple(reconstruction.shape)} do not match: both must be (batch, channels, height, "
            "width) of at least one image."
        )
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"mean has {len(mean)} and std {len(std)} values for images of {images.shape[1]} "
            "channels: give one value per channel."
        )
    height, width = images.shape[-2:]
    cell = height // mask.shape[1] if mask.ndim == 3 and mask.shape[1] else 0
    if tuple(mask.shape) != (len(images), height // max(cell, 1), width // max(cell, 1)):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit images of shape "
            f"{tuple(images.shape)}: it must be (batch, rows, columns) of square mask cells."
        )


def _bands_of(
    images: Tensor, mean: Sequence[float], std: Sequence[float], bands: Sequence[int] | None
) -> NDArray[Any]:
    """Return the drawn bands of images without normalisation: (batch, height, width, 3)."""
    scale = torch.tensor(std, dtype=torch.float32)[:, None, None]
    offset = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    values = (images.cpu() * scale + offset).nan_to_num(nan=0.0)
    return choose_bands(rearrange(values, "b c h w -> b h w c").numpy(), bands)


def _lay_out(columns: list[NDArray[Any]], captions: Sequence[str]) -> Image.Image:
    """Return four columns of images side by side, or two such blocks for many images."""
    count, height, width, _ = columns[0].shape
    factor = max(1, -(-SMALLEST_TILE // max(height, width)))
    blocks = 1 if count <= ROWS_BEFORE_SECOND_BLOCK else 2
    rows = -(-count // blocks)
    step_down, step_right = height * factor + GAP, width * factor + GAP
    block_width = len(columns) * step_right + 2 * GAP
    panel = Image.new("RGB", (blocks * block_width - GAP, HEADER + rows * step_down), PAPER)
    for block in range(blocks):
        for place, caption in enumerate(captions):
            left = block * block_width + GAP + place * step_right
            _write_caption(panel, caption, left, width * factor)
            tiles = columns[place][block * rows : (block + 1) * rows]
            for row, tile in enumerate(tiles):
                pixels = np.rint(tile * 255).astype(np.uint8)
                pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
                panel.paste(Image.fromarray(pixels), (left, HEADER + row * step_down))
    return panel


def _write_caption(panel: Image.Image, caption: str, left: int, width: int) -> None:
    center = (left + width // 2, HEADER // 2)
    font = ImageFont.load_default(size=13)
    ImageDraw.Draw(panel).text(center, caption, fill=INK, font=font, anchor="mm")
