"""The loss of RT-DETR, a sum over images divided by a given number of boxes.

transformers divides by the boxes at hand, and pads the noised boxes of the denoising task to the
largest number in the batch, which changes how many there are and what they attend to. Here each
image has its own noised boxes, from its own random numbers, and padding is attended to by none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Targets = Sequence[dict[str, Tensor]]
"""Of each image `class_labels`, int64 (boxes,), and `boxes`, float32 (boxes, 4): centre, width and
height as fractions of the image."""

Noised = tuple[Tensor | None, Tensor | None, Tensor | None, dict[str, Any] | None]
"""Embedded classes (batch, noised, channels), boxes before the sigmoid (batch, noised, 4), an
attention mask that is added to scores, and how the queries are grouped; None without boxes."""


def box_loss(
    net: Any, images: Tensor, targets: Targets, *, seeds: Sequence[int], boxes: Tensor
) -> Tensor:
    """Return the loss over all decoder layers, with the denoising task, as published.

    Args:
        net: RT-DETR of transformers.
        images: normalised (batch, channels, side, side).
        targets: objects of each image.
        seeds: seed of each image, for the noise on its boxes.
        boxes: number of boxes to divide by.
    """
    with _noising_each_image(seeds):
        output = net.model(images, labels=targets)
    groups = output.denoising_meta_values if net.training else None
    # Without objects the embedding is not used, and DDP waits for a gradient of every parameter.
    total: Tensor = 0.0 * net.model.denoising_class_embed.weight.sum()
    for row, target in enumerate(targets):
        own = None if groups is None else groups["images"][row]
        total = total + _loss_of_image(net, output, row, target, own) / boxes
    return total


def _loss_of_image(
    net: Any, output: Any, row: int, target: dict[str, Tensor], groups: dict[str, Any] | None
) -> Tensor:
    """Return the sum of the loss over the boxes of an image."""
    queries = net.config.num_queries
    noised = 0 if groups is None else groups["dn_num_split"][0]

    def own(values: Tensor) -> Tensor:
        """Return the image's row, (1, ..., queries, size), without padding of noised boxes."""
        values = values[row : row + 1]
        return torch.cat([values[..., :noised, :], values[..., -queries:, :]], dim=-2)

    classes, boxes = own(output.intermediate_logits), own(output.intermediate_reference_points)
    loss, _, _ = net.loss_function(
        classes[:, -1],
        [target],
        classes.device,
        boxes[:, -1],
        net.config,
        classes,
        boxes,
        enc_topk_logits=output.enc_topk_logits[row : row + 1],
        enc_topk_bboxes=output.enc_topk_bboxes[row : row + 1],
        denoising_meta_values=groups,
    )
    summed: Tensor = loss * max(1, len(target["class_labels"]))
    return summed


@contextmanager
def _noising_each_image(seeds: Sequence[int]) -> Iterator[None]:
    """Let RT-DETR noise the boxes of each image on their own."""
    from transformers.models.rt_detr import modeling_rt_detr  # noqa: PLC0415 - an optional part

    noise = modeling_rt_detr.get_contrastive_denoising_training_group

    def noise_each(*, targets: Targets, num_queries: int, **settings: Any) -> Noised:
        return noised_boxes(noise, targets, num_queries, seeds, settings)

    with mock.patch.object(modeling_rt_detr, noise.__name__, noise_each):
        yield


def noised_boxes(
    noise: Callable[..., Noised],
    targets: Targets,
    num_queries: int,
    seeds: Sequence[int],
    settings: dict[str, Any],
) -> Noised:
    """Return the noised boxes of all images, padded to the largest number.

    Args:
        noise: `get_contrastive_denoising_training_group` of transformers.
        targets: objects of each image.
        num_queries: number of queries that find objects.
        seeds: seed of each image.
        settings: more arguments of `noise`.

    Returns:
        As of `noise`, with an attention mask for each image, (batch, 1, all queries, all queries);
        `images` of the last part has the grouping of each image, None without boxes.
    """
    found = []
    for target, seed in zip(targets, seeds, strict=True):
        torch.manual_seed(seed)
        found.append(noise(targets=[target], num_queries=num_queries, **settings))
    longest = max((len(boxes[0]) for _, boxes, _, _ in found if boxes is not None), default=0)
    if not longest:
        return None, None, None, None
    total = longest + num_queries
    filled = next((classes, boxes) for classes, boxes, _, _ in found if boxes is not None)
    classes, boxes = (one.new_zeros(len(found), longest, one.shape[-1]) for one in filled)  # type: ignore[union-attr]
    mask = boxes.new_full((len(found), 1, total, total), -torch.inf)
    mask[..., range(total), range(total)] = 0.0  # padding attends to itself
    for row, (own_classes, own_boxes, own_mask, _) in enumerate(found):
        kept = torch.arange(longest, total, device=mask.device)
        if own_classes is not None and own_boxes is not None:
            count = len(own_boxes[0])
            classes[row, :count], boxes[row, :count] = own_classes[0], own_boxes[0]
            kept = torch.cat([torch.arange(count, device=mask.device), kept])
        mask[row, 0, kept[:, None], kept] = 0.0 if own_mask is None else own_mask
    groups = [one for _, _, _, one in found]
    return classes, boxes, mask, {"images": groups, "dn_num_split": [longest, num_queries]}
