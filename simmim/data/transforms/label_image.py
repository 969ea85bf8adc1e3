"""Label images: a PNG with a class number for each pixel."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from simmim.data.order.errors import BadSampleError, DataError
from simmim.data.transforms.pillow_decoding import DAMAGED, MAX_PIXELS, too_large

IGNORED = 255
"""What stands for no class in memory, whatever the files have."""

MOST_CLASSES = IGNORED


@dataclass(frozen=True, kw_only=True)
class LabelReading:
    """How the numbers in label images are to be understood."""

    num_classes: int
    ignore_label: int | None = 255
    """Number in the files that stands for no class."""
    reduce_zero_label: bool = False
    """Whether 0 stands for no class and the classes count from 1, as in ADE20K."""
    max_pixels: int = MAX_PIXELS

    def __call__(self, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        """Return the classes of an image of a shape (rows, columns, ...): uint8, IGNORED for none.

        Raises:
            BadSampleError: the file is damaged, or of another size than the image.
            DataError: it has colours for numbers, or a number that is no class.
        """
        numbers = self._decode(data)
        if numbers.shape != shape[:2]:
            raise BadSampleError(
                f"its labels have {numbers.shape[1]}x{numbers.shape[0]} pixels, the image "
                f"{shape[1]}x{shape[0]}: make them of the same size"
            )
        ignored = numbers == self.ignore_label
        if self.reduce_zero_label:
            ignored |= numbers == 0
        classes = numbers - int(self.reduce_zero_label)
        outside = ~ignored & ((classes < 0) | (classes >= self.num_classes))
        if outside.any():
            first = int(self.reduce_zero_label)
            raise DataError(
                f"its labels hold {int(numbers[outside][0])}, which is no class: there are "
                f"{self.num_classes}, from {first} to {self.num_classes - 1 + first}, and "
                f"{self.ignore_label} stands for none. Correct the file, data.num_classes, "
                "data.ignore_label or data.reduce_zero_label"
            )
        return np.where(ignored, IGNORED, classes).astype(np.uint8)

    def _decode(self, data: bytes) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > self.max_pixels:
                raise too_large(image.width, image.height, self.max_pixels)
            mode, values = image.mode, np.asarray(image)
        except UnidentifiedImageError:
            raise BadSampleError("its label image is damaged or of no known format") from None
        except BadSampleError:
            raise
        except DAMAGED as error:
            raise BadSampleError(f"its label image is damaged: {error}") from error
        if values.ndim != 2:
            raise DataError(
                f"its label image is of mode {mode}, which has colours: it must have one channel "
                "of class numbers (grey or palette)"
            )
        return values.astype(np.int64)
