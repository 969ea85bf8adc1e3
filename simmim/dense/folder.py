"""A folder of images and one of label images, as ADE20K has them."""

import hashlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from typing_extensions import Self

from simmim.data.errors import DataError
from simmim.data.randomness import shuffled
from simmim.data.source import LocalFiles

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})

SHARD_FILES = 256
"""Files that count as a shard: what the order of large sets shuffles as a whole."""

Item = TypeVar("Item")

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
class Pair:
    """The files of an image."""

    key: str
    image: Path
    labels: Path


class FileSet(LocalFiles, Generic[Item]):
    """A list of files in shards of `SHARD_FILES`."""

    _items: list[Item]

    @property
    def samples(self) -> int:
        """Number of images."""
        return len(self._items)

    @property
    def sizes(self) -> list[int]:
        """Images in each shard."""
        firsts = range(0, self.samples, SHARD_FILES)
        return [min(SHARD_FILES, self.samples - first) for first in firsts]

    def share(self, share: float, *, seed: int) -> Self:
        """Return this share of the images, in order; a larger one contains every smaller one."""
        count = max(1, round(share * self.samples))
        chosen = sorted(shuffled(self.samples, "share", seed)[:count].tolist())
        selection = copy(self)
        selection._items = [self._items[place] for place in chosen]
        return selection

    def item(self, shard: int, sample: int) -> Item:
        """Return what is known of a sample."""
        return self._items[shard * SHARD_FILES + sample]


class LabelledFolder(FileSet[Pair]):
    """The images of one split, each with the PNG of its labels; read as shards are.

    Args:
        root: folder with `images` and `annotations`.
        split: name of a folder in both, at any depth below which the images lie.

    Raises:
        ValueError: a folder is absent or empty, or images have no labels.
    """

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
        self._items = [
            Pair(
                key=str(file.relative_to(images).with_suffix("")),
                image=file,
                labels=(labels / file.relative_to(images)).with_suffix(".png"),
            )
            for file in sorted(images.rglob("*"))
            if file.suffix.lower() in EXTENSIONS
        ]
        if not self._items:
            raise ValueError(f"{images} holds no images: give a split with images, or fill it.")
        missing = [str(pair.labels) for pair in self._items if not pair.labels.is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._items)} images in {images} have no annotation: "
                f"there is no {', '.join(missing[:NAMED])}{' ...' if missing[NAMED:] else ''}. "
                "Add them, or take these images away."
            )

    @property
    def digest(self) -> str:
        """SHA-256 over the names and lengths of all files."""
        digest = hashlib.sha256()
        for pair in self._items:
            lengths = f"{pair.image.stat().st_size} {pair.labels.stat().st_size}"
            digest.update(f"{pair.key} {lengths}\n".encode())
        return digest.hexdigest()

    def files(self) -> Iterator[Path]:
        """Yield the files of all images and their labels."""
        for pair in self._items:
            yield from (pair.image, pair.labels)

    def name(self, shard: int, sample: int) -> str:
        """Return split and key of a sample."""
        return f"{self.split}/{self.item(shard, sample).key}"

    def read(self, shard: int, sample: int) -> LabelledImage:
        """Return a sample. Raises DataError naming a file that cannot be read."""
        pair = self.item(shard, sample)
        return LabelledImage(
            key=pair.key,
            shard_name=self.split,
            image=read_bytes(pair.image),
            extension=pair.image.suffix[1:].lower(),
            labels=read_bytes(pair.labels),
        )


def read_bytes(file: Path) -> bytes:
    """Return a whole file. Raises DataError naming it where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
