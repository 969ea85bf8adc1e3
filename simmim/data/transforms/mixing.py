"""Mixup and CutMix of neighbouring images in a batch, on the device.

The first image of a batch is mixed with the second, the third with the fourth, and so on. Batches
are shuffled, so neighbours are random pairs; they stay together on any number of ranks and with any
accumulation if each part of the batch is even; and the mix is drawn from seed, epoch and the first
image. So the mixed batch is the same wherever it is computed. (The published code mixes a rank's
batch with its own reverse, with one share for the whole batch.)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.settings import AugmentationSettings


@dataclass(frozen=True, kw_only=True)
class Mixes:
    """How each image of a batch is mixed with its partner; the same for both of a pair."""

    shares: Tensor
    """float32 (batch,): weight of the image itself, in the pixels and in the loss."""
    boxes: Tensor
    """int64 (batch, 4): top, bottom, left and right of the rectangle pasted from the partner; empty
    for mixup."""


def draw_mixes(
    settings: AugmentationSettings, seed: int, addresses: Tensor, size: tuple[int, int]
) -> Mixes:
    """Draw the mixing of a batch.

    Args:
        settings: parameters of mixup and CutMix.
        seed: seed of the training.
        addresses: int64 (batch, 3), epoch, shard and sample of each image, on the CPU.
        size: height and width of the images.
    """
    count = len(addresses)
    shares, boxes = np.ones(count, np.float32), np.zeros((count, 4), np.int64)
    for first, address in enumerate(addresses[: count - count % 2 : 2].tolist()):
        rng = numpy_stream("mix", seed, *address)
        pair = slice(2 * first, 2 * first + 2)
        if rng.random() >= settings.mix_probability:
            continue
        cuts = rng.random() < settings.mix_switch if settings.mixup and settings.cutmix else None
        if cuts is None:
            cuts = settings.cutmix > 0
        alpha = settings.cutmix if cuts else settings.mixup
        share = float(rng.beta(alpha, alpha))
        if cuts:
            top, bottom, left, right = boxes[pair] = _box(share, size, rng)
            share = 1 - (bottom - top) * (right - left) / (size[0] * size[1])
        shares[pair] = share
    return Mixes(shares=torch.from_numpy(shares), boxes=torch.from_numpy(boxes))


def _box(
    share: float, size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return a rectangle of 1 - share of the area around a random centre, clipped to the image."""
    ends: list[int] = []
    for side in size:
        cut = int(side * math.sqrt(1 - share))
        middle = int(rng.integers(side))
        ends += [max(middle - cut // 2, 0), min(middle + cut // 2, side)]
    return ends[0], ends[1], ends[2], ends[3]


def mix(images: Tensor, mixes: Mixes) -> Tensor:
    """Return images (batch, channels, height, width) mixed with their partners.

    Args:
        images: normalised; the last one of an odd batch is unchanged.
        mixes: mixing of the batch, on any device.
    """
    others = partners(images)
    shares = mixes.shares.to(images.device, non_blocking=True)
    boxes = mixes.boxes.to(images.device, non_blocking=True)[:, :, None, None]
    top, bottom, left, right = boxes.unbind(1)
    rows = torch.arange(images.shape[2], device=images.device)[None, :, None]
    columns = torch.arange(images.shape[3], device=images.device)[None, None, :]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    is_cut = (bottom > top) & (right > left)
    blended = torch.lerp(others, images, shares[:, None, None, None])
    pasted = torch.where(inside[:, None], others, images)
    return torch.where(is_cut[:, None], pasted, blended)


def partners(rows: Tensor) -> Tensor:
    """Return the rows of each row's partner: neighbours swapped in pairs."""
    even = len(rows) - len(rows) % 2
    order = torch.arange(len(rows), device=rows.device)
    order[:even] = order[:even].view(-1, 2).flip(1).reshape(-1)
    return rows[order]
