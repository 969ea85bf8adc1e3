"""The values of a stored image, as training would see them, for measuring and for showing."""

import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.format.fetching import open_for_parts
from data_prep.format.manifest import Location, PipedFile, ShardIndex
from data_prep.images.arrays import read_array
from data_prep.images.checking import RejectedImageError
from data_prep.images.encoding import turn_upright

_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_pixels(data: bytes, extension: str) -> NDArray[Any]:
    """Return the values of an image upright, (height, width, channels).

    Pictures have 1 channel of grey or 3 of colour, in uint8, or in uint16 where the file has 16
    bits of grey; transparent parts are white. Arrays are as they were stored.

    Raises:
        RejectedImageError: the image does not decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = read_array(data) if extension == "npy" else _read_picture(data)
        except MemoryError:
            raise
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RejectedImageError(f"it does not decode: {reason}") from None
    return values[..., None] if values.ndim == 2 else values


def read_images(
    path: Location | PipedFile, index: ShardIndex, rows: NDArray[np.int64]
) -> Iterator[bytes]:
    """Yield the files of some samples of a shard.

    Raises:
        OSError: the shard cannot be read.
    """
    with open_for_parts(path) as file:
        for offset, size in zip(index.offsets[rows], index.sizes[rows], strict=True):
            file.seek(int(offset))
            yield file.read(int(size))


def spread_rows(samples: list[int], most: int) -> list[NDArray[np.int64]]:
    """Return rows of each shard that together are `most` samples evenly spread over all.

    Args:
        samples: number of samples in each shard.
        most: how many to take; all where there are no more.
    """
    total = sum(samples)
    taken = min(most, total)
    # Python's integers, since the product of two large numbers may run over.
    places = np.array([place * total // taken for place in range(taken)], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(samples)])
    cuts = np.searchsorted(places, starts)
    return [
        places[cuts[number] : cuts[number + 1]] - starts[number] for number in range(len(samples))
    ]


def _read_picture(data: bytes) -> NDArray[Any]:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
        opened.load()
        image = turn_upright(opened)
    if image.mode in _WIDE_MODES:
        return np.asarray(image).astype(np.uint16)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return np.asarray(Image.alpha_composite(white, seen).convert("RGB"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
