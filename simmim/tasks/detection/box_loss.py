"""The loss of RT-DETR, a sum over images divided by a given number of boxes.

That of transformers divides by the boxes at hand, and waits for the device for every decoder layer.

Source: RT-DETR (CVPR 2024); varifocal loss (CVPR 2021); generalised IoU (CVPR 2019).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.tasks.detection.denoising import BoxTargets, NoisedBoxes, noise_boxes
from simmim.tasks.segmentation.matching import assign_queries, padded, precise
from simmim.tasks.segmentation.without_waiting import skip_finite_checks
from swinv2.kernels.precision import without_autocast


def box_loss(
    net: Any, images: Tensor, targets: BoxTargets, *, seeds: Sequence[int], boxes: Tensor
) -> Tensor:
    """Return the loss over all decoder layers, with the denoising task, as published.

    Args:
        net: RT-DETR of transformers.
        images: normalised (batch, channels, side, side).
        targets: boxes to find, and their classes.
        seeds: seed of each image, for the noise on its boxes.
        boxes: number of boxes to divide by.
    """
    noised = noise_boxes(net.config, targets, seeds) if net.training else None
    with _denoising(net, noised):
        output = net.model(images, labels=[])
    with without_autocast(images.device):
        # Without objects the embedding is not used, and DDP needs a gradient of every parameter.
        unused: Tensor = 0.0 * net.model.denoising_class_embed.weight.sum()
        return unused + _summed_terms(net.config, output, targets, noised) / boxes


@contextmanager
def _denoising(net: Any, noised: NoisedBoxes | None) -> Iterator[None]:
    """Let RT-DETR find these noised boxes instead of those it would draw, without waiting."""
    from transformers.models.rt_detr import modeling_rt_detr  # noqa: PLC0415 - an optional part

    def given(*, class_embed: nn.Module, num_queries: int, **_: Any) -> tuple[Any, ...]:
        if noised is None:
            return None, None, None, None
        groups = {"dn_num_split": [noised.boxes.shape[1], num_queries]}
        return class_embed(noised.classes), noised.boxes, noised.attention, groups

    skip_finite_checks(net, modeling_rt_detr.RTDetrEncoderLayer)
    name = modeling_rt_detr.get_contrastive_denoising_training_group.__name__
    with mock.patch.object(modeling_rt_detr, name, given):
        yield


@dataclass(frozen=True, kw_only=True)
class Found:
    """The predictions of all layers."""

    logits: Tensor
    """float32 (layers, batch, queries, classes)."""
    boxes: Tensor
    """float32 (layers, batch, queries, 4): centre, width and height as fractions."""
    weights: Tensor
    """float32 (batch, queries), the weight of each in the loss."""


def _summed_terms(
    config: Any, output: Any, targets: BoxTargets, noised: NoisedBoxes | None
) -> Tensor:
    """Return the weighted sum of all terms over the decoder layers and the encoder's proposals."""
    count = config.num_queries
    logits = precise(output.intermediate_logits).transpose(0, 1)
    boxes = precise(output.intermediate_reference_points).transpose(0, 1)
    proposals = precise(output.enc_topk_logits)[None], precise(output.enc_topk_bboxes)[None]
    found = Found(
        logits=torch.cat([logits[:, :, -count:], proposals[0]]),
        boxes=torch.cat([boxes[:, :, -count:], proposals[1]]),
        weights=logits.new_ones(logits.shape[1], count),
    )
    with torch.no_grad():
        queries = assign_queries(_costs(config, found, targets), targets.counts)
    total = _terms(config, found, queries, targets)
    if noised is None:
        return total
    found = Found(logits=logits[:, :, :-count], boxes=boxes[:, :, :-count], weights=noised.weights)
    places = noised.places.expand(len(logits), -1)
    return total + _terms(config, found, places, noised.targets)


def _costs(config: Any, found: Found, targets: BoxTargets) -> Tensor:
    """Return the costs of matching, (layers, batch, queries, targets)."""
    alpha, gamma = config.matcher_alpha, config.matcher_gamma
    labels = padded(targets.labels, targets.counts)[:, None]
    chance = found.logits.sigmoid().gather(-1, labels.expand(*found.logits.shape[:-1], -1))
    absent = (1 - alpha) * chance**gamma * -(1 - chance + 1e-8).log()
    present = alpha * (1 - chance) ** gamma * -(chance + 1e-8).log()
    boxes, given = found.boxes[..., None, :], padded(targets.boxes, targets.counts)[:, None]
    distance = (boxes - given).abs().sum(-1)
    _, overlap = box_overlap(boxes, given)
    costs: Tensor = (
        config.matcher_bbox_cost * distance
        + config.matcher_class_cost * (present - absent)
        - config.matcher_giou_cost * overlap
    )
    return costs


def _terms(config: Any, found: Found, queries: Tensor, targets: BoxTargets) -> Tensor:
    """Return the weighted sum of varifocal loss, L1 distance and generalised IoU.

    Args:
        config: that of RT-DETR, with the weights of terms.
        found: the predictions.
        queries: query of each target, (layers, targets); the number of queries for none.
        targets: boxes to find.
    """
    layers, batch, count, classes = found.logits.shape
    layer = torch.arange(layers, device=queries.device)[:, None]
    boxes = found.boxes[layer, targets.images, queries.clamp(max=count - 1)]
    overlap, generalised = box_overlap(boxes, targets.boxes)
    distance = (boxes - targets.boxes).abs().sum(-1)
    losses = config.weight_loss_bbox * distance + config.weight_loss_giou * (1 - generalised)
    # One more query, of weight 0, for targets without one.
    of_targets = F.pad(found.weights, (0, 1))[targets.images, queries]
    scores = found.logits.new_zeros(2, layers, batch, count + 1, classes)
    scores[:, layer, targets.images, queries, targets.labels] = torch.stack(
        [overlap.detach(), torch.ones_like(overlap)]
    )
    score, is_target = scores[:, :, :, :count]
    chance = found.logits.detach().sigmoid()
    focus = config.focal_loss_alpha * chance**config.focal_loss_gamma * (1 - is_target) + score
    varifocal = F.binary_cross_entropy_with_logits(found.logits, score, reduction="none") * focus
    on_boxes: Tensor = (losses * of_targets).sum()
    on_classes: Tensor = config.weight_loss_vfl * (varifocal * found.weights[..., None]).sum()
    return on_boxes + on_classes


def box_overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU of pairs of boxes.

    Args:
        first: centre, width and height, (..., 4).
        second: the same, of a shape that broadcasts.
    """
    (start, end), (other_start, other_end) = _corners(first), _corners(second)
    common = (torch.minimum(end, other_end) - torch.maximum(start, other_start)).clamp(min=0)
    around = torch.maximum(end, other_end) - torch.minimum(start, other_start)
    inside, outside = _area(common), _area(around)
    union = _area(end - start) + _area(other_end - other_start) - inside
    overlap = inside / union
    return overlap, overlap - (outside - union) / outside


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper left and lower right corners."""
    centre, extent = boxes.chunk(2, dim=-1)
    return centre - extent / 2, centre + extent / 2


def _area(extent: Tensor) -> Tensor:
    """Return width times height; the gradient of `prod` would wait for the device."""
    return extent[..., 0] * extent[..., 1]
