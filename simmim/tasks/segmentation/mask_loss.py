"""The loss of Mask2Former, whose terms are sums over images divided by given numbers.

The criterion of transformers normalises by the images at hand, draws points for all of them at
once, and waits for the device for every image and decoder layer. Here images have random numbers of
their own, and all of them are matched at once.

Source: Mask2Former (CVPR 2022), sections 3.3 and 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.compat import tensors_sent_by
from simmim.tasks.segmentation.matching import assign_queries, padded, precise
from simmim.tasks.segmentation.without_waiting import skip_finite_checks, to_device
from swinv2.kernels.precision import without_autocast


@dataclass(frozen=True, kw_only=True)
class MaskTargets:
    """The target masks of the images of a batch, those of the first image first."""

    masks: Tensor
    """bool (targets, rows, columns)."""
    labels: Tensor
    """int64 (targets,), the class of each."""
    images: Tensor
    """int64 (targets,), the image of each; see `image_of_targets`."""
    counts: Sequence[int]
    """Number of targets of each image."""


def mask_normalisers(net: Any, targets: Sequence[int]) -> Tensor:
    """Return the number of target masks, and the weight of all queries, float32 (2,).

    A query that no target is matched to has a smaller weight in the cross entropy.

    Args:
        net: Mask2Former of transformers.
        targets: number of target masks of each image.
    """
    queries, no_object = net.config.num_queries, float(net.config.no_object_weight)
    matched = [min(count, queries) for count in targets]
    weights = [count + no_object * (queries - count) for count in matched]
    return torch.tensor([float(sum(targets)), sum(weights)])


def mask_loss(
    net: Any, images: Tensor, targets: MaskTargets, *, seeds: Sequence[int], normalisers: Tensor
) -> Tensor:
    """Return the loss over all decoder layers, as published.

    Args:
        net: Mask2Former of transformers.
        images: normalised (batch, channels, side, side).
        targets: masks to find, and their classes.
        seeds: seed of each image, for the points that masks are compared at.
        normalisers: number of masks and weight of queries to divide by; see `mask_normalisers`.
    """
    from transformers.models.mask2former import modeling_mask2former  # noqa: PLC0415 - optional

    skip_finite_checks(net, modeling_mask2former.Mask2FormerPixelDecoderEncoderLayer)
    with tensors_sent_by(to_device, modeling_mask2former):
        output = net(pixel_values=images, output_auxiliary_logits=True)
    layers = [output, *output.auxiliary_logits]
    logits = [one["masks_queries_logits"] for one in layers]
    with without_autocast(images.device):
        classes = precise(torch.stack([one["class_queries_logits"] for one in layers]))
        sums = _summed_terms(net, classes, logits, targets, seeds)
        return (sums / normalisers).sum()


def _summed_terms(
    net: Any, classes: Tensor, logits: Sequence[Tensor], targets: MaskTargets, seeds: Sequence[int]
) -> Tensor:
    """Return the weighted sums over all layers of the terms of masks, and of queries, (2,).

    Args:
        net: Mask2Former of transformers.
        classes: class logits, (layers, batch, queries, classes + 1).
        logits: mask logits of each layer, (batch, queries, rows, columns).
        targets: masks to find, and their classes.
        seeds: seed of each image.
    """
    targets = replace(targets, masks=targets.masks.to(classes.dtype))
    draws = [torch.Generator(classes.device).manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        points = _draw(draws, [1] * len(seeds), (len(logits), net.criterion.num_points, 2))
        costs = [
            _mask_costs(net.criterion.matcher, precise(one), targets, places)
            for one, places in zip(logits, points.unbind(1), strict=True)
        ]
        of_classes = _class_costs(net.criterion.matcher, classes, targets)
        queries = assign_queries(of_classes + torch.stack(costs), targets.counts)
    total = classes.new_zeros(())
    for one, chosen in zip(logits, queries, strict=True):
        total = total + _mask_terms(net, one, chosen, targets, draws)
    return torch.stack([total, _class_terms(net, classes, queries, targets)])


def _draw(
    draws: Sequence[torch.Generator], counts: Sequence[int], shape: tuple[int, ...]
) -> Tensor:
    """Draw uniform numbers from 0 to 1, (all counts, *shape), from the generator of each image."""
    return torch.cat(
        [
            torch.rand(count, *shape, generator=draw, device=draw.device)
            for count, draw in zip(counts, draws, strict=True)
        ]
    )


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Interpolate maps (count, channels, rows, columns) at points: (count, channels, points).

    Args:
        maps: values at the centres of pixels.
        points: columns and rows as fractions of the map, (count, points, 2).
    """
    grid = 2 * points[:, :, None].to(maps.dtype) - 1
    return F.grid_sample(maps, grid, align_corners=False)[..., 0]


def _class_costs(matcher: Any, classes: Tensor, targets: MaskTargets) -> Tensor:
    """Return the costs of classes: (layers, batch, queries, targets)."""
    labels = padded(targets.labels, targets.counts)[:, None].expand(*classes.shape[:-1], -1)
    costs: Tensor = -matcher.cost_class * classes.softmax(-1).gather(-1, labels)
    return costs


def _mask_costs(matcher: Any, logits: Tensor, targets: MaskTargets, points: Tensor) -> Tensor:
    """Return the costs of the masks of a layer, at random points: (batch, queries, targets).

    Args:
        matcher: that of transformers, with the weights of costs.
        logits: (batch, queries, rows, columns).
        targets: masks to find.
        points: (batch, points, 2).
    """
    found = _sample(logits, points)
    of_targets = _sample(targets.masks[:, None], points[targets.images])[:, 0]
    given = padded(of_targets, targets.counts).mT
    inside, count = found.sigmoid(), points.shape[1]
    entropy = F.softplus(-found) @ given + F.softplus(found) @ (1 - given)
    sums = inside.sum(-1)[..., None] + given.sum(-2)[:, None]
    dice = 1 - (2 * inside @ given + 1) / (sums + 1)
    costs: Tensor = matcher.cost_mask * entropy / count + matcher.cost_dice * dice
    return costs


def _mask_terms(
    net: Any,
    logits: Tensor,
    queries: Tensor,
    targets: MaskTargets,
    draws: Sequence[torch.Generator],
) -> Tensor:
    """Return the weighted sum of the losses of all masks of a layer.

    Args:
        net: Mask2Former of transformers.
        logits: (batch, queries, rows, columns).
        queries: query of each target; see `assign_queries`.
        targets: masks to find.
        draws: random numbers of each image.
    """
    weights, count = net.weight_dict, logits.shape[1]
    found = precise(logits[targets.images, queries.clamp(max=count - 1)])[:, None]
    with torch.no_grad():
        points = _uncertain_points(net.criterion, found, targets.counts, draws)
        given = _sample(targets.masks[:, None], points)[:, 0]
    found = _sample(found, points)[:, 0]
    inside = found.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(found, given, reduction="none").mean(1)
    dice = 1 - (2 * (inside * given).sum(1) + 1) / (inside.sum(1) + given.sum(1) + 1)
    terms: Tensor = weights["loss_mask"] * entropy + weights["loss_dice"] * dice
    return (terms * (queries < count)).sum()


def _uncertain_points(
    criterion: Any, found: Tensor, counts: Sequence[int], draws: Sequence[torch.Generator]
) -> Tensor:
    """Return the points of each mask that it is compared at: (targets, points, 2).

    Most of them are those, of a multiple of their number, where the logit is closest to 0.
    """
    candidates = int(criterion.num_points * criterion.oversample_ratio)
    uncertain = int(criterion.importance_sample_ratio * criterion.num_points)
    drawn = _draw(draws, counts, (candidates + criterion.num_points - uncertain, 2))
    points, others = drawn[:, :candidates], drawn[:, candidates:]
    best = _sample(found, points)[:, 0].abs().topk(uncertain, largest=False).indices
    return torch.cat([points.gather(1, best[..., None].expand(-1, -1, 2)), others], dim=1)


def _class_terms(net: Any, classes: Tensor, queries: Tensor, targets: MaskTargets) -> Tensor:
    """Return the weighted sum of the cross entropies of all queries of all layers."""
    layers, batch, count, num_classes = classes.shape
    # One more query, for targets without one.
    wanted = targets.labels.new_full((layers, batch, count + 1), num_classes - 1)
    layer = torch.arange(layers, device=classes.device)[:, None]
    wanted[layer, targets.images, queries] = targets.labels.expand_as(queries)
    entropy = F.cross_entropy(
        classes.flatten(0, 2),
        wanted[..., :count].flatten(),
        weight=net.criterion.empty_weight.to(classes.dtype),
        reduction="sum",
    )
    weighted: Tensor = net.weight_dict["loss_cross_entropy"] * entropy
    return weighted
