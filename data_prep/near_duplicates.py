"""Images that look alike, found by their perceptual hashes."""

from __future__ import annotations

import io
import itertools
import warnings
from collections import defaultdict

from PIL import Image

BITS = 64
"""Length of a hash; the distance of two is the number of bits that differ."""


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
    is equal. Memory grows with the number of images, by about 100 bytes a band for each.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        bounds = [band * BITS // (distance + 1) for band in range(distance + 2)]
        self._bands = [
            (start, (1 << (stop - start)) - 1) for start, stop in itertools.pairwise(bounds)
        ]
        self._seen: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self._paths: list[str] = []

    def find(self, value: int) -> str | None:
        """Return the path of the first image that is near, None where there is none."""
        near = {
            number
            for key in self._keys(value)
            for number, other in self._seen.get(key, ())
            if (value ^ other).bit_count() <= self._distance
        }
        return self._paths[min(near)] if near else None

    def add(self, value: int, path: str) -> None:
        """Remember an image."""
        for key in self._keys(value):
            self._seen[key].append((len(self._paths), value))
        self._paths.append(path)

    def _keys(self, value: int) -> list[tuple[int, int]]:
        return [(start, value >> start & mask) for start, mask in self._bands]
