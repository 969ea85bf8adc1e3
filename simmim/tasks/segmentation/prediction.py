"""Classes of all pixels of an image: whole or in windows, at several scales, mirrored or not."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.tasks.segmentation.recipe import SegmentationEvaluation

Scores = Callable[[Tensor], Tensor]
"""Turns normalised images (batch, channels, rows, columns) into the score of each class for each
pixel, (batch, classes, rows, columns): probabilities, or other numbers that may be averaged."""


def predict(
    scores: Scores,
    images: Tensor,
    size: tuple[int, int],
    evaluation: SegmentationEvaluation,
    *,
    side: int,
) -> Tensor:
    """Return the mean score of each class for each pixel: (batch, classes, *size).

    Args:
        scores: the model.
        images: normalised (batch, channels, rows, columns).
        size: rows and columns of the result.
        evaluation: scales, mirroring and windows.
        side: of windows, where `evaluation` gives none.
    """
    total: Tensor | None = None
    for scale in evaluation.scales:
        rows, columns = (max(1, round(scale * length)) for length in images.shape[-2:])
        scaled = images if scale == 1 else _resize(images, (rows, columns))
        for mirrored in (False, True) if evaluation.flip else (False,):
            found = _look(scores, scaled.flip(-1) if mirrored else scaled, evaluation, side)
            found = _resize(found.flip(-1) if mirrored else found, size)
            total = found if total is None else total + found
    assert total is not None
    return total / (len(evaluation.scales) * (2 if evaluation.flip else 1))


def _look(scores: Scores, images: Tensor, evaluation: SegmentationEvaluation, side: int) -> Tensor:
    if evaluation.mode == "whole":
        return scores(images).float()
    size = evaluation.size or side
    stride = evaluation.stride or max(1, size * 2 // 3)
    total: Tensor | None = None
    counts = images.new_zeros(images.shape[-2:])
    for top in starts(images.shape[-2], size, stride):
        for left in starts(images.shape[-1], size, stride):
            here = (..., slice(top, top + size), slice(left, left + size))
            found = scores(images[here]).float()
            if total is None:
                total = found.new_zeros(*found.shape[:2], *images.shape[-2:])
            total[here] += found
            counts[here] += 1
    assert total is not None
    return total / counts


def starts(length: int, size: int, stride: int) -> Iterator[int]:
    """Yield where windows begin that cover a length; the last one ends with it."""
    last = max(0, length - size)
    yield from range(0, last, stride)
    yield last


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def classes_of(scores: Tensor) -> Tensor:
    """Return the class of the greatest score: int64 (batch, rows, columns)."""
    return torch.argmax(scores, dim=1)
