"""Labels of samples: a class, a list of classes, or a label map with a class per pixel."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.images.opening import UnknownFormatError, open_picture
from data_prep.images.orientation import orientation_of, turn_array
from simmim.data.order.source import BadSampleError, DataError, EncodedImage
from simmim.data.transforms.decoding import too_large_error
from simmim.data.transforms.settings import LabelMapSettings, MultiLabelSettings
from simmim.data.transforms.turned import size_error

IGNORED = 255
"""Value of pixels without a class in memory, whatever it is in the files."""

SEPARATORS = re.compile(r"[\s,;|]+")
"""Separators of classes in a string."""


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
            raise BadSampleError("the image has no JSON file that lists its classes")
        try:
            listed = json.loads(about)[self.settings.field]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            raise BadSampleError(
                f"the JSON of the image has no field {self.settings.field!r}"
            ) from None
        if isinstance(listed, str):
            return [part for part in SEPARATORS.split(listed) if part]
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


@dataclass(frozen=True)
class LabelMapReader:
    """Reader of label maps: PNG files with a class number per pixel."""

    settings: LabelMapSettings

    def __call__(
        self, data: bytes, shape: tuple[int, ...], image: bytes = b""
    ) -> NDArray[np.uint8]:
        """Return the class of each pixel of the upright image, IGNORED for none.

        Args:
            data: the encoded label map.
            shape: (rows, columns, ...) of the upright image.
            image: the encoded image, whose orientation is named if sizes differ.

        Raises:
            BadSampleError: the file is damaged, or of another size than the image.
            DataError: it has colours rather than numbers, or a number that is not a class; or it
                is of the stored pixels of an image that is turned.
        """
        numbers = self._decode(data)
        rows, columns = numbers.shape
        if (rows, columns) != shape[:2]:
            raise size_error(
                image,
                (shape[0], shape[1]),
                (rows, columns),
                of="label map",
                remedy="make them the same size",
            )
        return self._classes(numbers)

    def read(self, data: bytes) -> NDArray[np.uint8]:
        """Return the class of each pixel without its image; raises as a call does."""
        return self._classes(self._decode(data))

    def _classes(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the classes for the numbers in a file. Raises DataError if one is not a class."""
        settings, first = self.settings, int(self.settings.reduce_zero_label)
        ignored = numbers == settings.ignore_label
        if settings.reduce_zero_label:
            ignored |= numbers == 0
        classes = numbers - first
        outside = ~ignored & ((classes < 0) | (classes >= settings.num_classes))
        if outside.any():
            raise DataError(
                f"its label map contains {int(numbers[outside][0])}, which is not a class: the "
                f"{settings.num_classes} classes are {first} to "
                f"{settings.num_classes - 1 + first}, and {settings.ignore_label} means no class. "
                "Correct the file, data.num_classes, data.ignore_label or data.reduce_zero_label."
            )
        return np.where(ignored, IGNORED, classes).astype(np.uint8)

    def _decode(self, data: bytes) -> NDArray[np.int64]:
        try:
            image = open_picture(data)
            if image.width * image.height > self.settings.max_pixels:
                raise too_large_error(image.width, image.height, self.settings.max_pixels)
            mode, values = image.mode, turn_array(np.asarray(image), orientation_of(image))
        except UnknownFormatError:
            raise BadSampleError("its label map is damaged or of an unknown format") from None
        except (BadSampleError, MemoryError):
            raise
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception as error:
            raise BadSampleError(f"its label map is damaged: {error}") from error
        if values.ndim != 2:
            raise DataError(
                f"its label map is of mode {mode}: it must have one channel of class numbers "
                "(grey or palette)."
            )
        return values.astype(np.int64)
