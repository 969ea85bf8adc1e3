"""What a dense stage learns of one image: a class of each pixel, or the objects in it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Own = TypeVar("Own", bound="Targets")


@dataclass(frozen=True)
class Targets:
    """Tensors of one image. They travel as bytes, for the reason that batches do."""

    def each(self: Own, change: Callable[[Tensor], Tensor]) -> Own:
        """Return the same with each tensor changed."""
        return type(self)(*(change(getattr(self, field.name)) for field in fields(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = [getattr(self, field.name).cpu().numpy() for field in fields(self)]
        return targets_of, (type(self), arrays)


def targets_of(kind: type[Own], arrays: list[np.ndarray]) -> Own:
    """Return targets as they were before they were sent."""
    return kind(*(torch.from_numpy(array) for array in arrays))


@dataclass(frozen=True)
class ClassMap(Targets):
    """A class for each pixel."""

    classes: Tensor
    """uint8 (height, width), 255 where nothing counts."""


@dataclass(frozen=True)
class Instances(Targets):
    """The objects in an image that are learnt."""

    labels: Tensor
    """int64 (objects,)."""
    boxes: Tensor
    """float32 (objects, 4): left, top, right, bottom, pixels."""
    masks: Tensor
    """bool (objects, height, width); of no height where only boxes are wanted."""
    image: Tensor
    """int64 (3,): id of the image, its height and width as annotated, for predictions."""
