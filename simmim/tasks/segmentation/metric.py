"""Segmentation metrics from a confusion matrix, which is summed over ranks."""

import torch
from torch import Tensor

from simmim.data.transforms.labels import IGNORED


def confusion(predicted: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix, int64: true class in rows, predicted class in columns.

    Args:
        predicted: class of each pixel, of any shape.
        classes: true classes of the same shape; pixels with IGNORED are not counted.
        num_classes: side of the matrix.
    """
    counted = classes != IGNORED
    pairs = classes[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """Return the IoU of each class, on the CPU; NaN if it is in neither labels nor predictions."""
    counts = counts.cpu().double()  # in this order: not every device has float64
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def segmentation_figures(counts: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Return mIoU, mean accuracy and pixel accuracy in percent, and the IoU of each class.

    Means are over the classes that occur: in labels or predictions for IoU, in labels for accuracy.
    Classes that do not occur have no IoU.
    """
    counts = counts.cpu().double()
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
