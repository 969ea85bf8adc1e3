"""Reconstruction panels: original, masked, prediction, and prediction pasted into the original."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.format.atomic import atomic_write_bytes
from simmim.method.losses import denormalise_target
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
    norm_target: bool = False,
) -> None:
    """Draw inputs and reconstructions into a PNG, one row per image.

    Args:
        images: (batch, channels, height, width), normalised. One or two channels are drawn as grey
            (the first); of more than three, the first three are drawn.
        mask: bool (batch, rows, columns) of mask cells, True = hidden.
        reconstruction: predicted pixels, same shape as `images`.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
        path: PNG to write atomically; its folder is created if missing.
        norm_target: whether the prediction is of normalised pixels (see `normalise_target` in
            `simmim.method.losses`); colours are restored with the local mean and variance of the
            original.

    Raises:
        ValueError: the shapes do not match, or there are no images.
    """
    _check(images, mask, reconstruction, mean, std)
    images, reconstruction = images.detach().float(), reconstruction.detach().float()
    if norm_target:
        reconstruction = denormalise_target(reconstruction, images)
    original = _to_colors(images, mean, std)
    prediction = _to_colors(reconstruction, mean, std)
    hidden = enlarge_mask(mask.cpu(), images.shape[-2] // mask.shape[1])[..., None].numpy()
    masked = np.where(hidden, np.float32(HIDDEN_GREY), original)
    pasted = np.where(hidden, prediction, original)
    panel = _lay_out([original, masked, prediction, pasted])
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


def _to_colors(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Return images without normalisation: float32 (batch, height, width, 3) from 0 to 1."""
    scale = torch.tensor(std, dtype=torch.float32)[:, None, None]
    offset = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    colors = (images.cpu() * scale + offset).nan_to_num(nan=0.0).clamp(0, 1)
    colors = colors[:, :3] if colors.shape[1] >= 3 else colors[:, :1].expand(-1, 3, -1, -1)
    return rearrange(colors, "b c h w -> b h w c").numpy()


def _lay_out(columns: list[NDArray[np.float32]]) -> Image.Image:
    """Return four columns of images side by side, or two such blocks for many images."""
    count, height, width, _ = columns[0].shape
    factor = max(1, -(-SMALLEST_TILE // max(height, width)))
    blocks = 1 if count <= ROWS_BEFORE_SECOND_BLOCK else 2
    rows = -(-count // blocks)
    step_down, step_right = height * factor + GAP, width * factor + GAP
    block_width = len(columns) * step_right + 2 * GAP
    panel = Image.new("RGB", (blocks * block_width - GAP, HEADER + rows * step_down), PAPER)
    for block in range(blocks):
        for place, caption in enumerate(CAPTIONS):
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
