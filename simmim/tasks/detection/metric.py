"""Box and mask mAP by the official implementation, pycocotools.

It is what published figures were measured with; faster-coco-eval is a rewriting of it.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, Literal

import numpy as np
import torch

from simmim.data.transforms.detection_transforms import box_of
from simmim.tasks.detection.heads import Found, masks_at

NAMES = ("map", "map50", "map75", "map_small", "map_medium", "map_large")
"""What the first numbers of COCO's summary are."""


def results_of(
    found: Found, image: Sequence[int], side: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return what was found in an image as COCO's results, in the image's own pixels.

    Args:
        found: in the padded square.
        image: id, rows and columns.
        side: of the square, pixels.
        category_ids: of each class.
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
    """Return a bool (rows, columns) mask as COCO's run lengths."""
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
    """Return mAP and its parts in percent, under box_map, box_map50, ... or mask_map, ...

    Args:
        ground_truth: content of a COCO file.
        results: what was found.
        images: ids of the images that were looked at.
        kind: boxes or masks.

    Returns:
        The figures; those of which there is nothing, such as small objects, are left out.
    """
    from pycocotools.coco import COCO  # noqa: PLC0415 - an optional part
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

    prefix = {"bbox": "box", "segm": "mask"}[kind]
    if not results:
        return {f"{prefix}_{NAMES[0]}": 0.0}
    with redirect_stdout(io.StringIO()):  # it prints what it does
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        # A result with a mask would be measured by it where areas are sorted by size.
        kept = [one if kind == "segm" else _only_box(one) for one in results]
        evaluation = COCOeval(truth, truth.loadRes(kept), kind)
        evaluation.params.imgIds = sorted(images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        f"{prefix}_{name}": 100 * float(value)
        for name, value in zip(NAMES, evaluation.stats, strict=False)
        if value >= 0
    }


def _only_box(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "segmentation"}


def most_certain(found: Found, least: float) -> Found:
    """Return what has at least this score."""
    kept = torch.nonzero(found.scores >= least).flatten()
    return Found(
        labels=found.labels[kept],
        scores=found.scores[kept],
        boxes=None if found.boxes is None else found.boxes[kept],
        masks=None if found.masks is None else found.masks[kept],
    )
