import math

import pytest
import torch

from simmim.data.transforms.labels import IGNORED
from simmim.tasks.segmentation.metric import confusion, segmentation_figures
from simmim.tasks.segmentation.prediction import predict, window_starts
from simmim.tasks.segmentation.recipe import SegmentationEvaluation


def test_metrics_equal_those_computed_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [0, 1, IGNORED, IGNORED]], dtype=torch.uint8)
    found = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 2]])
    figures = segmentation_figures(confusion(found, truth, 4), ("a", "b", "c", "d"))
    assert figures["iou/a"] == figures["iou/b"] == pytest.approx(50)  # 2 of 4
    assert figures["miou"] == pytest.approx(50)
    assert figures["pixel_accuracy"] == pytest.approx(100 * 4 / 6)
    assert figures["mean_accuracy"] == pytest.approx(100 * 2 / 3)
    assert "iou/c" not in figures  # neither there nor, where it counts, found


def test_a_falsely_predicted_class_has_iou_zero() -> None:
    truth = torch.zeros(4, dtype=torch.uint8)
    figures = segmentation_figures(confusion(torch.tensor([0, 0, 0, 1]), truth, 2), ("a", "b"))
    assert figures["iou/b"] == 0
    assert figures["miou"] == pytest.approx(37.5)
    assert not math.isnan(figures["mean_accuracy"])


def scores(images: torch.Tensor) -> torch.Tensor:
    """What depends on each pixel alone, whatever surrounds it."""
    return torch.cat([images, 1 - images], dim=1)


@pytest.mark.parametrize(
    "evaluation",
    [
        SegmentationEvaluation(),
        SegmentationEvaluation(flip=True),
        SegmentationEvaluation(mode="slide", size=8, stride=5),
        SegmentationEvaluation(mode="slide", size=40, flip=True),
    ],
)
def test_every_inference_mode_returns_each_pixels_own_score(
    evaluation: SegmentationEvaluation,
) -> None:
    images = torch.rand(1, 1, 17, 23)
    found = predict(scores, images, (17, 23), evaluation, side=8)
    torch.testing.assert_close(found, scores(images))


def test_scales_are_averaged() -> None:
    images = torch.full((1, 1, 8, 8), 0.25)
    sizes = []

    def noted(part: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(part.shape[-2:]))
        return scores(part)

    evaluation = SegmentationEvaluation(scales=(0.5, 1.0, 1.5), flip=True)
    found = predict(noted, images, (8, 8), evaluation, side=8)
    torch.testing.assert_close(found, scores(images))
    assert sizes == [(4, 4)] * 2 + [(8, 8)] * 2 + [(12, 12)] * 2


@pytest.mark.parametrize(
    ("length", "size", "stride"), [(10, 4, 3), (4, 4, 2), (3, 8, 5), (11, 4, 4)]
)
def test_windows_cover_all_and_stay_inside(length: int, size: int, stride: int) -> None:
    found = list(window_starts(length, size, stride))
    covered = {place for first in found for place in range(first, min(length, first + size))}
    assert covered == set(range(length))
    assert found == sorted(set(found))
    assert found[-1] == max(0, length - size)


@pytest.mark.parametrize("size", [None, 8])
def test_windows_with_gaps_are_refused(size: int | None) -> None:
    evaluation = SegmentationEvaluation(mode="slide", size=size, stride=9)
    with pytest.raises(ValueError, match="gaps"):
        evaluation.check_stride(8)
    SegmentationEvaluation(mode="slide", size=size, stride=8).check_stride(8)
    SegmentationEvaluation(size=size, stride=9).check_stride(8)  # without windows
