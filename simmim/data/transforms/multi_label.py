"""Images with any number of classes: a list in the JSON beside each."""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmim.data.order.errors import BadSampleError
from simmim.data.order.source import EncodedImage
from simmim.data.transforms.settings import MultiLabelSettings

BETWEEN = re.compile(r"[\s,;|]+")
"""What separates classes that are listed in one text."""


@dataclass(frozen=True)
class MultiLabelReader:
    """Reader of the classes listed in an image's JSON."""

    settings: MultiLabelSettings

    def __call__(self, raw: EncodedImage) -> Tensor:
        """Return which classes an image has, bool (classes,).

        Raises:
            BadSampleError: its JSON has no list of classes, or lists an unknown one.
        """
        found = torch.zeros(len(self.settings.classes), dtype=torch.bool)
        for item in self._listed(raw):
            found[self._index(item)] = True
        return found

    def _listed(self, raw: EncodedImage) -> list[Any]:
        about = raw.about
        if about is None:
            raise BadSampleError("the image has no JSON beside it that lists its classes")
        try:
            listed = json.loads(about)[self.settings.field]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            raise BadSampleError(
                f"the JSON of the image has no field {self.settings.field!r}"
            ) from None
        if isinstance(listed, str):
            return [part for part in BETWEEN.split(listed) if part]
        return listed if isinstance(listed, list) else [listed]

    def _index(self, item: Any) -> int:
        """Return the index of a class given by name or by index."""
        classes = self.settings.classes
        if item in classes:
            return classes.index(item)
        if isinstance(item, str) and item.isascii() and item.isdecimal():
            item = int(item[:20])
        if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < len(classes):
            return item
        raise BadSampleError(
            f"the field {self.settings.field!r} of the image lists {item!r}, which is not one of"
            f" the {len(classes)} classes"
        )
