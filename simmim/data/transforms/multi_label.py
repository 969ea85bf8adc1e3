"""Images with any number of classes: a list in the JSON beside each."""

import json
import re
from typing import Any

import torch
from torch import Tensor

from simmim.data.order.errors import BadSampleError
from simmim.data.order.source import EncodedImage
from simmim.recipe import settings

BETWEEN = re.compile(r"[\s,;|]+")
"""What separates classes that are listed in one text."""


@settings
class MultiLabelSettings:
    """Where the classes of an image are listed, if it may have several or none."""

    classes: tuple[str, ...]
    """Names of all classes, in order. Images list them by name, or by place from 0."""
    field: str = "labels"
    """Field of the JSON beside each image: a list, or a text with blanks, commas, semicolons or
    bars between. `data-prep shard LIST.csv` makes fields of a list's columns; in a folder of
    images, `x.json` stands beside `x.jpg`."""

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be names, at least one, and each once.")

    def __call__(self, raw: EncodedImage) -> Tensor:
        """Return which classes an image has, bool (classes,).

        Raises:
            BadSampleError: its JSON has no list of them, or one that is not among them.
        """
        found = torch.zeros(len(self.classes), dtype=torch.bool)
        for item in self._listed(raw):
            found[self._place(item)] = True
        return found

    def _listed(self, raw: EncodedImage) -> list[Any]:
        about = raw.about
        if about is None:
            raise BadSampleError("the image has no JSON beside it that lists its classes")
        try:
            listed = json.loads(about)[self.field]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            raise BadSampleError(f"the JSON of the image has no field {self.field!r}") from None
        if isinstance(listed, str):
            return [part for part in BETWEEN.split(listed) if part]
        return listed if isinstance(listed, list) else [listed]

    def _place(self, item: Any) -> int:
        """Return the place of a class that is named, or given by its place."""
        if item in self.classes:
            return self.classes.index(item)
        if isinstance(item, str) and item.isascii() and item.isdecimal():
            item = int(item[:20])
        if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < len(self.classes):
            return item
        raise BadSampleError(
            f"the field {self.field!r} of the image lists {item!r}, which is none of the"
            f" {len(self.classes)} classes"
        )
