"""The assignment of predictions to targets in the losses of dense heads, with one wait per step.

The Hungarian algorithm runs on the host. The costs of all decoder layers and images go there in one
copy, and all indices come back in one that nothing waits for. The targets of the images of a batch
are stacked in a row; how many there are is known on the host, and so is every shape.

Source: DETR (ECCV 2020), section 3.1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simmim.tasks.segmentation.without_waiting import to_device


def assign_queries(costs: Tensor, counts: Sequence[int]) -> Tensor:
    """Assign a query to each target so that the total cost of each image is minimal.

    This waits for the device. NaN and infinite costs count as the largest number.

    Args:
        costs: (layers, images, queries, targets), targets padded to the largest number of an image.
        counts: number of targets of each image.

    Returns:
        int64 (layers, targets of all images), on the device of the costs. An image with more
        targets than queries leaves some without: theirs is the number of queries.
    """
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - an optional part

    worst = torch.finfo(costs.dtype).max
    on_host = costs.nan_to_num(worst, worst, worst).cpu().numpy()
    layers, _, queries, _ = costs.shape
    found = np.full((layers, sum(counts)), queries, dtype=np.int64)
    for row, of_images in zip(found, on_host, strict=True):
        first = 0
        for cost, count in zip(of_images, counts, strict=True):
            query, target = linear_sum_assignment(cost[:, :count])
            row[first + target] = query
            first += count
    return to_device(torch.from_numpy(found), costs.device)


def image_of_targets(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the image of each target, int64 (targets,), from the number of targets of images."""
    images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return to_device(images, device)


def padded(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return values of targets (targets, ...) by image: (images, largest count, ...)."""
    return pad_sequence(list(torch.split(values, list(counts))), batch_first=True)


def precise(values: Tensor) -> Tensor:
    """Return values in float32, if their type is less precise."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
