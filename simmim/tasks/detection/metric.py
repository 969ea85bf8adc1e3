"""Box and mask mAP by pycocotools, the official implementation of published results."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, Literal

import numpy as np
import torch

from simmim.data.transforms.detection_transforms import box_of
from simmim.tasks.detection.heads import Detections, masks_at

NAMES = ("map", "map50", "map75", "map_small", "map_medium", "map_large")
"""Names of the first values in COCO's summary."""


def results_of(
    found: Detections, image: Sequence[int], side: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return detections as COCO results, in pixels of the image.

    Args:
        found: detections in the padded square.
        image: id, rows and columns.
        side: side of the square in pixels.
        category_ids: COCO id of each class.
    """
    number, rows, columns = image
    masks = None
    if found.masks is not None:
        masks = masks_at(found.masks, side, (rows, columns)).cpu().numpy()
        boxes = np.array([box_of(mask) for mask in masks], dtype=np.float64).reshape(-1, 4)
    else:
        assert found.boxes is not None
        boxes = found.boxes.cpu().double().numpy() * max(rows, columns) / side
        boxes = boxes.clip(0, [columns, rows, columns, rows])
    results = []
    for place, (label, score) in enumerate(
        zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    ):
        left, top, right, bottom = boxes[place].tolist()
        if right <= left or bottom <= top:
            continue
        result = {
            "image_id": int(number),
            "category_id": category_ids[label],
            "score": score,
            "bbox": [left, top, right - left, bottom - top],
        }
        if masks is not None:
            result["segmentation"] = encode_mask(masks[place])
        results.append(result)
    return results


def encode_mask(pixels: np.ndarray) -> dict[str, Any]:
    """Encode a bool (rows, columns) mask as COCO RLE."""
    from pycocotools import mask  # noqa: PLC0415 - an optional part

    encoded: dict[str, Any] = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    encoded["counts"] = encoded["counts"].decode("ascii")
    return encoded


def mean_average_precision(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    images: Sequence[int],
    kind: Literal["bbox", "segm"],
) -> dict[str, float]:
    """Return mAP and related metrics in percent: box_map, box_map50, ... or mask_map, ...

    Args:
        ground_truth: content of a COCO file.
        results: detections as COCO results.
        images: ids of the evaluated images.
        kind: boxes or masks.

    Returns:
        The metrics, without those that have no objects (such as small ones); 0 without detections.
    """
    from pycocotools.coco import COCO  # noqa: PLC0415 - an optional part
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

    prefix = {"bbox": "box", "segm": "mask"}[kind]
    with redirect_stdout(io.StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        # With a mask, a result's area would be the mask's, which decides small, medium or large.
        kept = [one if kind == "segm" else _only_box(one) for one in results]
        found = truth.loadRes(kept) if kept else _no_detections(truth)
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.imgIds = sorted(images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        f"{prefix}_{name}": 100 * float(value)
        for name, value in zip(NAMES, evaluation.stats, strict=False)
        if value >= 0
    }


def _no_detections(truth: Any) -> Any:
    """Return a COCO object of no results, which `loadRes` cannot make."""
    found = type(truth)()
    found.dataset = truth.dataset | {"annotations": []}
    found.createIndex()
    return found


def _only_box(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "segmentation"}


def above_score(found: Detections, least: float) -> Detections:
    """Return the detections with at least this score."""
    kept = torch.nonzero(found.scores >= least).flatten()
    return Detections(
        labels=found.labels[kept],
        scores=found.scores[kept],
        boxes=None if found.boxes is None else found.boxes[kept],
        masks=None if found.masks is None else found.masks[kept],
    )
