"""Queries are assigned to targets as scipy does it for one layer and image."""

import pytest
import torch

pytest.importorskip("scipy", reason="needs simmim[finetune]")

from scipy.optimize import linear_sum_assignment

from simmim.tasks.segmentation.matching import assign_queries, image_of_targets, padded

COUNTS = [3, 0, 6, 1]
LAYERS, QUERIES = 3, 4


def costs_of(seed: int) -> torch.Tensor:
    """Return random costs, of padding too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, len(COUNTS), QUERIES, max(COUNTS), generator=generator)


def test_every_layer_and_image_is_matched_by_itself() -> None:
    costs = costs_of(0)
    found = assign_queries(costs, COUNTS)
    assert found.shape == (LAYERS, sum(COUNTS))
    for layer in range(LAYERS):
        for image, row in enumerate(found[layer].split(COUNTS)):
            queries, targets = linear_sum_assignment(costs[layer, image, :, : COUNTS[image]])
            expected = torch.full((COUNTS[image],), QUERIES)
            expected[targets] = torch.from_numpy(queries)
            assert torch.equal(row, expected)


def test_targets_that_no_query_is_left_for_have_the_number_of_queries() -> None:
    of_image = assign_queries(costs_of(1), COUNTS)[:, 3:9]
    assert (of_image == QUERIES).sum(1).tolist() == [2] * LAYERS
    assert of_image.sort(dim=1).values[:, :QUERIES].tolist() == [[0, 1, 2, 3]] * LAYERS


def test_queries_without_a_cost_are_matched_last() -> None:
    costs = torch.zeros(1, 1, 3, 2)
    costs[0, 0, 0], costs[0, 0, 2, 1] = torch.nan, -torch.inf
    assert sorted(assign_queries(costs, [2])[0].tolist()) == [1, 2]
    assert assign_queries(costs, [2])[0, 0] == 2  # where the other target has an infinite cost


def test_targets_in_a_row_and_by_image() -> None:
    images = image_of_targets(COUNTS, torch.device("cpu"))
    assert images.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 2, 3]
    by_image = padded(torch.arange(1, 11), COUNTS)
    assert by_image[:, :3].tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 6], [10, 0, 0]]
    assert padded(torch.zeros(0, 4), [0, 0]).shape == (2, 0, 4)
