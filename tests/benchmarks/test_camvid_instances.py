"""Instances from label images, compared with pycocotools."""

from typing import Any

import numpy as np
import pytest
from camvid_instances import objects_of, run_lengths


def test_run_lengths_match_pycocotools() -> None:
    mask: Any = pytest.importorskip("pycocotools.mask", reason="needs simmim[finetune]")
    random = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.7, 1.0):
        pixels = random.random((9, 7)) < share
        encoded = run_lengths(pixels)
        decoded = mask.decode(mask.frPyObjects(encoded, 9, 7)).astype(bool)
        assert np.array_equal(decoded, pixels)


def test_each_connected_component_of_a_movable_class_is_an_instance() -> None:
    classes = np.zeros((40, 60), dtype=np.uint8)
    classes[2:12, 3:13] = 8
    classes[20:30, 3:15] = 8
    classes[2:12, 13:33] = 9  # touches a car, but is another instance
    classes[35:37, 50:52] = 8  # too small
    classes[20:40, 30:45] = 3  # not a movable class
    found = objects_of(classes, image=4, first=7, smallest=64)
    assert [(one["id"], one["image_id"], one["category_id"]) for one in found] == [
        (7, 4, 8),
        (8, 4, 8),
        (9, 4, 9),
    ]
    assert [one["bbox"] for one in found] == [[3, 2, 10, 10], [3, 20, 12, 10], [13, 2, 20, 10]]
    assert [one["area"] for one in found] == [100, 120, 200]
