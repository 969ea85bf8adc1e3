"""Metrics and masks compute in float64 on the CPU alone: not every device has it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from simmim.method.masking import average_distance
from simmim.tasks.classification.multi_label import average_precisions
from simmim.tasks.segmentation.metric import (
    confusion,
    intersection_over_union,
    segmentation_figures,
)

LEAVES = {Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__bool__, Tensor.__int__}


class OnDevice(Tensor):
    """A tensor as on a device without float64; what is computed from it is there, too."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            if func in LEAVES:
                return found.as_subclass(Tensor) if isinstance(found, Tensor) else found

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            assert value.dtype != torch.float64, f"float64 on a device, by {func}"
            return value.as_subclass(cls)

        return tree_map(place, found)


def on_device(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnDevice)


def test_the_stand_in_finds_float64() -> None:
    with pytest.raises(AssertionError, match="float64 on a device"):
        on_device(torch.ones(2)).double()
    with pytest.raises(AssertionError, match="float64 on a device"):
        on_device(torch.ones(2)).sum(dtype=torch.float64)
    assert on_device(torch.ones(2)).cpu().double().sum() == 2


def test_segmentation_figures() -> None:
    torch.manual_seed(0)
    predicted, classes = torch.randint(0, 3, (2, 50))
    counts = confusion(predicted, classes, 3)
    expected = segmentation_figures(counts, ("a", "b", "c"))
    there = confusion(on_device(predicted), on_device(classes), 3)
    assert segmentation_figures(there, ("a", "b", "c")) == expected
    assert torch.equal(intersection_over_union(there), intersection_over_union(counts))


def test_average_precisions() -> None:
    torch.manual_seed(0)
    scores, labels = torch.rand(40, 3), torch.rand(40, 3) > 0.5
    expected = average_precisions(scores, labels)
    assert torch.equal(average_precisions(on_device(scores), on_device(labels)), expected)


def test_the_distance_of_masks() -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 6, 6) > 0.4
    assert average_distance(on_device(mask), 4) == average_distance(mask, 4)
