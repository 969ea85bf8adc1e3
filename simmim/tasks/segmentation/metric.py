"""How well classes of pixels are told apart: a confusion matrix, and what follows from it.

A matrix that is summed over ranks is all there is to it: torchmetrics would be the larger part.
"""

import torch
from torch import Tensor

from simmim.data.transforms.labels import IGNORED


def confusion(predicted: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (rows) and predicted class (columns), int64; IGNORED do not count.

    Args:
        predicted: class of each pixel, of any shape.
        classes: the true ones, of the same shape.
        num_classes: sides of the matrix.
    """
    counted = classes != IGNORED
    pairs = classes[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """Return the IoU of each class, NaN for one that neither is there nor is predicted."""
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def segmentation_figures(counts: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Return mIoU, mean accuracy and pixel accuracy in percent, and the IoU of each class.

    Means are over the classes that there are: in the truth or predicted for the IoU, in the truth
    for the accuracy. A class that is neither has no figure.
    """
    counts = counts.double().cpu()
    union = intersection_over_union(counts)
    recall = counts.diagonal() / counts.sum(1)
    figures = {
        "miou": 100 * float(union.nanmean()),
        "mean_accuracy": 100 * float(recall.nanmean()),
        "pixel_accuracy": 100 * float(counts.diagonal().sum() / counts.sum()),
    }
    of_classes = {
        f"iou/{name}": 100 * float(value)
        for name, value in zip(names, union, strict=True)
        if not torch.isnan(value)
    }
    return figures | of_classes
