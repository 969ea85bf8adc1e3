"""A folder of images and one of label images, as ADE20K has them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from simmim.data.errors import DataError
from simmim.data.randomness import shuffled

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})

SHARD_FILES = 256
"""Files that count as a shard: what the order of large sets shuffles as a whole."""

_Item = TypeVar("_Item")

NAMED = 5
"""Files that a message names."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image and its labels as they lie on disk: encoded."""

    key: str
    """Path within the folder of the split, without its extension."""
    shard_name: str
    image: bytes
    extension: str
    labels: bytes

    @property
    def name(self) -> str:
        """What messages call it, and what seeds its randomness."""
        return f"{self.shard_name}/{self.key}"


@dataclass(frozen=True, kw_only=True)
class _Pair:
    key: str
    image: Path
    labels: Path


class LabelledFolder:
    """The images of one split, each with the PNG of its labels; read as shards are.

    Args:
        root: folder with `images` and `annotations`.
        split: name of a folder in both, at any depth below which the images lie.

    Raises:
        ValueError: a folder is absent or empty, or images have no labels.
    """

    classes: tuple[str, ...] = ()
    """No class stands for a whole image."""
    fetches_whole_shards = False

    def __init__(self, root: str | Path, split: str) -> None:
        self.folder = Path(root)
        self.split = split
        images, labels = self.folder / "images" / split, self.folder / "annotations" / split
        for place in (images, labels):
            if not place.is_dir():
                raise ValueError(
                    f"{place} is no folder: {root} needs images/{split} and annotations/{split}, "
                    "with a PNG of class numbers for each image; or name another split."
                )
        self._pairs = [
            _Pair(
                key=str(file.relative_to(images).with_suffix("")),
                image=file,
                labels=(labels / file.relative_to(images)).with_suffix(".png"),
            )
            for file in sorted(images.rglob("*"))
            if file.suffix.lower() in EXTENSIONS
        ]
        if not self._pairs:
            raise ValueError(f"{images} holds no images: give a split with images, or fill it.")
        missing = [str(pair.labels) for pair in self._pairs if not pair.labels.is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._pairs)} images in {images} have no annotation: "
                f"there is no {', '.join(missing[:NAMED])}{' ...' if missing[NAMED:] else ''}. "
                "Add them, or take these images away."
            )

    @property
    def samples(self) -> int:
        """Images of the split."""
        return len(self._pairs)

    @property
    def sizes(self) -> list[int]:
        """Images in each shard."""
        return shard_sizes(self.samples)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and lengths of all files."""
        digest = hashlib.sha256()
        for pair in self._pairs:
            lengths = f"{pair.image.stat().st_size} {pair.labels.stat().st_size}"
            digest.update(f"{pair.key} {lengths}\n".encode())
        return digest.hexdigest()

    def share(self, share: float, *, seed: int) -> "LabelledFolder":
        """Return this share of the images, in order; a larger one contains every smaller one."""
        selection = object.__new__(LabelledFolder)
        selection.__dict__ |= self.__dict__
        selection._pairs = share_of(self._pairs, share, seed)
        return selection

    def fetch(self, shard: int) -> None:
        """Do nothing: the files are here."""

    def folder_of(self, shard: int) -> str:
        """Return the folder, for messages."""
        del shard
        return str(self.folder)

    def name(self, shard: int, sample: int) -> str:
        """Return split and key of a sample."""
        return f"{self.split}/{self._pairs[shard * SHARD_FILES + sample].key}"

    def read(self, shard: int, sample: int) -> LabelledImage:
        """Return a sample. Raises DataError naming a file that cannot be read."""
        pair = self._pairs[shard * SHARD_FILES + sample]
        return LabelledImage(
            key=pair.key,
            shard_name=self.split,
            image=read_bytes(pair.image),
            extension=pair.image.suffix[1:].lower(),
            labels=read_bytes(pair.labels),
        )


def shard_sizes(samples: int) -> list[int]:
    """Return how many of so many samples stand in each shard of `SHARD_FILES`."""
    return [min(SHARD_FILES, samples - first) for first in range(0, samples, SHARD_FILES)]


def share_of(samples: Sequence[_Item], share: float, seed: int) -> list[_Item]:
    """Return this share of the samples, at least one, in order; by the seed alone."""
    count = max(1, round(share * len(samples)))
    chosen = sorted(shuffled(len(samples), "share", seed)[:count].tolist())
    return [samples[place] for place in chosen]


def read_bytes(file: Path) -> bytes:
    """Return a whole file. Raises DataError naming it where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
