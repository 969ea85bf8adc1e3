"""Segmentation inference: whole image or sliding window, multi-scale, with flip."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.tasks.segmentation.recipe import SegmentationEvaluation

ScoreFunction = Callable[[Tensor], Tensor]
"""Maps normalised images (batch, channels, rows, columns) to scores that may be averaged, such as
probabilities, (batch, classes, rows, columns)."""


def predict(
    scores: ScoreFunction,
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
        evaluation: scales, flip and windows.
        side: side of the sliding windows, if `evaluation` has none.
    """
    total: Tensor | None = None
    for scale in evaluation.scales:
        rows, columns = (max(1, round(scale * length)) for length in images.shape[-2:])
        scaled = images if scale == 1 else _resize(images, (rows, columns))
        for mirrored in (False, True) if evaluation.flip else (False,):
            found = _scores_at_one_scale(
                scores, scaled.flip(-1) if mirrored else scaled, evaluation, side
            )
            found = _resize(found.flip(-1) if mirrored else found, size)
            total = found if total is None else total + found
    assert total is not None
    return total / (len(evaluation.scales) * (2 if evaluation.flip else 1))


def _scores_at_one_scale(
    scores: ScoreFunction, images: Tensor, evaluation: SegmentationEvaluation, side: int
) -> Tensor:
    if evaluation.mode == "whole":
        return scores(images).float()
    size = evaluation.size or side
    stride = evaluation.stride or max(1, size * 2 // 3)
    total: Tensor | None = None
    counts = images.new_zeros(images.shape[-2:])
    for top in window_starts(images.shape[-2], size, stride):
        for left in window_starts(images.shape[-1], size, stride):
            here = (..., slice(top, top + size), slice(left, left + size))
            found = scores(images[here]).float()
            if total is None:
                total = found.new_zeros(*found.shape[:2], *images.shape[-2:])
            total[here] += found
            counts[here] += 1
    assert total is not None
    return total / counts


def window_starts(length: int, size: int, stride: int) -> Iterator[int]:
    """Yield the starts of sliding windows that cover a length; the last window ends with it."""
    last = max(0, length - size)
    yield from range(0, last, stride)
    yield last


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def classes_of(scores: Tensor) -> Tensor:
    """Return the class with the highest score: int64 (batch, rows, columns)."""
    return torch.argmax(scores, dim=1)
