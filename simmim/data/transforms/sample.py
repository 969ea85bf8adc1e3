"""A decoded and transformed sample, with the targets of dense tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

TargetsT = TypeVar("TargetsT", bound="Targets")


@dataclass(frozen=True)
class Targets:
    """Base of the target tensors of one image; pickled as arrays, like batches."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the targets with a function applied to each tensor."""
        return type(self)(*(function(getattr(self, field.name)) for field in fields(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = [getattr(self, field.name).cpu().numpy() for field in fields(self)]
        return _unpickle_targets, (type(self), arrays)


def _unpickle_targets(kind: type[TargetsT], arrays: list[NDArray[Any]]) -> TargetsT:
    """Rebuild pickled targets."""
    return kind(*(torch.from_numpy(array) for array in arrays))


@dataclass(frozen=True)
class ClassMap(Targets):
    """A class per pixel."""

    classes: Tensor
    """uint8 (height, width), 255 for ignored pixels."""


@dataclass(frozen=True)
class Instances(Targets):
    """The target objects of an image."""

    labels: Tensor
    """int64 (objects,)."""
    boxes: Tensor
    """float32 (objects, 4): left, top, right, bottom in pixels."""
    masks: Tensor
    """bool (objects, height, width); of height 0 if only boxes are used."""
    image: Tensor
    """int64 (3,): id, annotated height and annotated width of the image, for predictions."""


@dataclass(frozen=True)
class Sample:
    """A transformed sample, ready to be batched."""

    image: Tensor
    """(channels, height, width): uint8, or the type of the array."""
    mask: Tensor | None
    """bool (rows, columns) of mask cells, True = hidden."""
    label: int | Tensor
    """Class index, -1 for none; or bool (classes,), the classes it has."""
    flip: bool = False
    """Whether to flip the image horizontally, on the device."""
    repaired: str | None = None
    """Defect of a damaged file that could be decoded."""
    targets: Targets | None = None
    """Targets of dense tasks."""


def stack_labels(samples: Sequence[Sample], *, has_classes: bool) -> Tensor | None:
    """Return the labels of a batch; None if samples are unlabelled (`has_classes` is False)."""
    several = [sample.label for sample in samples if isinstance(sample.label, Tensor)]
    if several:
        return torch.stack(several)
    if not has_classes:
        return None
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64)
