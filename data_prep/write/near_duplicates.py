"""Images that look alike, found by their perceptual hashes."""

import io
import os
import tempfile
import warnings
from array import array
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

BITS = 64
"""Length of a hash; the distance of two is the number of bits that differ."""


_MOST_KEY_BITS = 16
"""Bits of a band that images are looked up by: more would be as many lists as images."""


_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)
"""Bits that are set in each number of 16 bits."""


class MissingHashError(ValueError):
    """The library of perceptual hashes is not installed."""


def require_hashes() -> None:
    """Check that perceptual hashes can be taken.

    Raises:
        MissingHashError: the library is missing.
    """
    try:
        import imagehash  # noqa: F401, PLC0415
    except ImportError:
        raise MissingHashError(
            "--near-duplicates needs ImageHash, which is missing: pip install 'simmim[dedup]'"
        ) from None


def perceptual_hash(data: bytes, *, max_pixels: int) -> int | None:
    """Return the DCT hash of an image, None where it does not decode or is too large."""
    import imagehash  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    return None
                return int(str(imagehash.phash(image)), 16)
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception:
            return None  # it is rejected, with the reason, when it is written


class SimilarImages:
    """Hashes seen so far, and the first that is near to another one.

    Hashes are cut into one band more than bits may differ: of two that are near, at least one band
    is equal, so that only images with an equal band are compared. Of each image 16 bytes are held,
    and 4 more for each band, which with room to grow are about 80 at a distance of 6; paths are on
    disk. The wider the distance, the narrower the bands and
    the more is compared: with 6 bits, 1.4% of all pairs.
    """

    def __init__(self, distance: int, folder: Path) -> None:
        self._distance = distance
        bounds = [band * BITS // (distance + 1) for band in range(distance + 2)]
        widths = ((start, min(stop - start, _MOST_KEY_BITS)) for start, stop in pairwise(bounds))
        self._bands = [(start, (1 << width) - 1) for start, width in widths]
        self._numbers: list[dict[int, array[int]]] = [{} for _ in self._bands]
        self._hashes = array("Q")
        self._paths = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._ends = array("Q", [0])

    def find(self, value: int) -> str | None:
        """Return the path of the first image that is near, None where there is none."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        first = None
        for numbers, key in zip(self._numbers, self._keys(value), strict=True):
            if key in numbers:
                alike = np.frombuffer(numbers[key], dtype=np.uint32)
                differ = (hashes[alike] ^ np.uint64(value)).view(np.uint16).reshape(-1, 4)
                near = alike[_ONES[differ].sum(axis=1) <= self._distance]  # in ascending order
                if len(near) and (first is None or near[0] < first):
                    first = int(near[0])
        return None if first is None else self._path(first)

    def add(self, value: int, path: str) -> None:
        """Remember an image."""
        for numbers, key in zip(self._numbers, self._keys(value), strict=True):
            numbers.setdefault(key, array("I")).append(len(self._hashes))
        self._hashes.append(value)
        self._paths.seek(0, os.SEEK_END)
        self._paths.write(path.encode("utf-8", "surrogateescape"))
        self._ends.append(self._paths.tell())

    def close(self) -> None:
        """Remove what is on disk."""
        self._paths.close()

    def _path(self, number: int) -> str:
        start, end = self._ends[number], self._ends[number + 1]
        self._paths.seek(start)
        return self._paths.read(end - start).decode("utf-8", "surrogateescape")

    def _keys(self, value: int) -> list[int]:
        return [value >> start & mask for start, mask in self._bands]
