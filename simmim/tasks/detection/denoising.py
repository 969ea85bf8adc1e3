"""The denoising task of RT-DETR: find boxes from noised ones.

transformers pads the noised boxes of an image to the largest number in the batch before it draws
noise, which changes how many there are and what they attend to. Here each image has its own noised
boxes, from its own random numbers, and padding is attended to by none. All that does not depend on
the values of boxes is made on the host, so that nothing waits for the device.

Source: DN-DETR (CVPR 2022); DINO (ICLR 2023), section 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simmim.tasks.segmentation.without_waiting import to_device


@dataclass(frozen=True, kw_only=True)
class BoxTargets:
    """The target boxes of the images of a batch, those of the first image first."""

    boxes: Tensor
    """float32 (targets, 4): centre, width and height as fractions of the image."""
    labels: Tensor
    """int64 (targets,), the class of each."""
    images: Tensor
    """int64 (targets,), the image of each; see `image_of_targets`."""
    counts: Sequence[int]
    """Number of targets of each image."""


@dataclass(frozen=True, kw_only=True)
class NoisedBoxes:
    """The noised boxes of all images, padded to the largest number.

    A group has each box of an image twice: first all with little noise, from which the box is to
    be found, and then all with more, from which nothing is.
    """

    classes: Tensor
    """int64 (batch, noised), some of them wrong."""
    boxes: Tensor
    """float32 (batch, noised, 4), before the sigmoid."""
    attention: Tensor
    """float32 (batch, 1, all queries, all queries), 0 or -inf, added to the scores of attention."""
    weights: Tensor
    """float32 (batch, noised): 1 / number of groups of the image, 0 for padding."""
    targets: BoxTargets
    """What is to be found: each target once for each group of its image."""
    places: Tensor
    """int64 (targets,): from which of the noised boxes of the image each is found."""


def noise_boxes(config: Any, targets: BoxTargets, seeds: Sequence[int]) -> NoisedBoxes | None:
    """Return the noised boxes of all images; None if there are no boxes.

    Args:
        config: that of RT-DETR.
        targets: boxes of the batch, and their classes.
        seeds: seed of each image.
    """
    if not sum(targets.counts):
        return None
    device = targets.boxes.device
    starts = [sum(targets.counts[:image]) for image in range(len(seeds))]
    drawn = [_draw(config, *each) for each in zip(targets.counts, starts, seeds, strict=True)]
    indices, noise = (pad_sequence(list(one), batch_first=True) for one in zip(*drawn, strict=True))
    images, places = indices[..., 3].nonzero(as_tuple=True)
    found = torch.stack([images, places, indices[images, places, 0]])
    target, group, label, _ = to_device(indices, device).unbind(-1)
    noise = to_device(noise, device)
    images, places, original = to_device(found, device)
    return NoisedBoxes(
        classes=torch.where(label < 0, targets.labels[target], label),
        boxes=_logits(_shifted(targets.boxes[target], noise[..., :4] * config.box_noise_scale)),
        attention=_attention(group, config.num_queries),
        weights=noise[..., 4],
        targets=BoxTargets(
            boxes=targets.boxes[original],
            labels=targets.labels[original],
            images=images,
            counts=indices[..., 3].sum(1).tolist(),
        ),
        places=places,
    )


def _draw(config: Any, count: int, start: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw what is random about the noised boxes of an image, on the host.

    Args:
        config: that of RT-DETR.
        count: number of target boxes of the image.
        start: place of the first of them in the batch.
        seed: seed of the image.

    Returns:
        int64 (noised, 4): target, group from 1 on, wrong class or -1, and whether it is found; and
        float32 (noised, 5): shifts of left, top, right and bottom as multiples of half the width or
        height, and 1 / number of groups.
    """
    groups = max(1, config.num_denoising // max(1, count))
    noised = 2 * groups * count
    target = start + torch.arange(count).repeat(2 * groups)
    half = torch.arange(2 * groups).repeat_interleave(count)
    much = half % 2
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(noised, generator=generator, dtype=torch.float32)
    wrong = torch.randint(
        config.num_labels, (noised,), generator=generator, dtype=torch.int32
    ).long()
    label = torch.where(chance < config.label_noise_ratio * 0.5, wrong, -1)
    sign = torch.randint(2, (noised, 4), generator=generator) * 2 - 1
    shift = (torch.rand(noised, 4, generator=generator) + much[:, None]) * sign
    weight = torch.full((noised, 1), 1 / groups)
    return torch.stack([target, 1 + half // 2, label, 1 - much], 1), torch.cat([shift, weight], 1)


def _shifted(boxes: Tensor, shift: Tensor) -> Tensor:
    """Return boxes whose sides are shifted by multiples of half their width or height."""
    centre, extent = boxes.chunk(2, dim=-1)
    half = extent / 2
    left_top = (centre - half + shift[..., :2] * half).clamp(0, 1)
    right_bottom = (centre + half + shift[..., 2:] * half).clamp(0, 1)
    return torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=-1)


def _logits(fractions: Tensor, least: float = 1e-5) -> Tensor:
    """Return the inverse of the sigmoid."""
    return (fractions.clamp(least, 1) / (1 - fractions).clamp(least, 1)).log()


def _attention(group: Tensor, queries: int) -> Tensor:
    """Return the attention mask, 0 or -inf: float32 (batch, 1, all queries, all queries).

    Noised boxes attend to their own group and to the queries, the queries to each other, and
    padding to itself.

    Args:
        group: of each noised box, from 1 on, 0 for padding: (batch, noised).
        queries: number of queries that find objects.
    """
    groups = F.pad(group, (0, queries), value=-1)
    of_one, of_other = groups[:, :, None], groups[:, None]
    attends = (of_one != 0) & ((of_one == of_other) | (of_other == -1))
    attends |= torch.eye(groups.shape[1], dtype=torch.bool, device=group.device)
    return torch.zeros_like(attends, dtype=torch.float32).masked_fill(~attends, -torch.inf)[:, None]
