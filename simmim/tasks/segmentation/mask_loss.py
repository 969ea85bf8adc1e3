"""The loss of Mask2Former, whose terms are sums over images divided by given numbers.

The criterion of transformers normalises by the images at hand, and draws points for all of them
at once. Here it is applied to one image at a time, with random numbers of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mask_normalisers(net: Any, targets: Sequence[int]) -> Tensor:
    """Return the number of target masks, and the weight of all queries, float32 (2,).

    A query that no target is matched to has a smaller weight in the cross entropy.

    Args:
        net: Mask2Former of transformers.
        targets: number of target masks of each image.
    """
    return torch.tensor([[float(count), _weight(net, count)] for count in targets]).sum(0)


def _weight(net: Any, targets: int) -> float:
    queries: int = net.config.num_queries
    matched = min(targets, queries)
    return matched + float(net.config.no_object_weight) * (queries - matched)


def mask_loss(
    net: Any,
    images: Tensor,
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    normalisers: Tensor,
) -> Tensor:
    """Return the loss over all decoder layers, as published.

    Args:
        net: Mask2Former of transformers.
        images: normalised (batch, channels, side, side).
        masks: target masks of each image, float32 (targets, side, side).
        labels: their classes, int64 (targets,).
        seeds: seed of each image, for the points that masks are compared at.
        normalisers: number of masks and weight of queries to divide by; see `mask_normalisers`.
    """
    output = net(pixel_values=images, output_auxiliary_logits=True)
    layers = [
        {name: output[name] for name in ("masks_queries_logits", "class_queries_logits")},
        *output.auxiliary_logits,
    ]
    total = images.new_zeros(())
    for row, seed in enumerate(seeds):
        torch.manual_seed(seed)
        for layer in layers:
            found = {name: values[row : row + 1] for name, values in layer.items()}
            total = total + _loss_of_image(net, found, masks[row], labels[row], normalisers)
    return total


def _loss_of_image(
    net: Any, found: dict[str, Tensor], masks: Tensor, labels: Tensor, normalisers: Tensor
) -> Tensor:
    """Return the loss of one decoder layer on one image."""
    criterion, weights = net.criterion, net.weight_dict
    mask_logits, class_logits = found["masks_queries_logits"], found["class_queries_logits"]
    matched = criterion.matcher(mask_logits, class_logits, [masks], [labels])
    terms = criterion.loss_masks(mask_logits, [masks], matched, 1)
    entropy = criterion.loss_labels(class_logits, [labels], matched)["loss_cross_entropy"]
    weighted = weights["loss_mask"] * terms["loss_mask"] + weights["loss_dice"] * terms["loss_dice"]
    share = _weight(net, len(labels)) / normalisers[1]
    loss: Tensor = weighted / normalisers[0] + weights["loss_cross_entropy"] * entropy * share
    return loss
