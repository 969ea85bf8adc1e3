"""A folder of images and one of label images, as ADE20K has them."""

import hashlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from typing_extensions import Self

from simmim.data.order.errors import DataError
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import LocalFiles
from simmim.recipe import settings

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


@settings
class Layout:
    """Where images and their labels lie in a folder; as in ADE20K, unless told otherwise."""

    images: str = "images/{split}"
    """Folder of a split's images, at any depth below it; {split} is the name of the split."""
    annotations: str = "annotations/{split}"
    """Folder of their labels, at the same places below it."""
    image_suffix: str = ""
    """What the names of images end with before their extension; `_leftImg8bit` in Cityscapes."""
    annotation_suffix: str = ""
    """What stands in its place in the names of labels, before `.png`; `_gtFine_labelTrainIds`
    there."""

    def folders(self, root: Path, split: str) -> tuple[Path, Path]:
        """Return the folders of images and of labels."""
        images, labels = (one.replace("{split}", split) for one in (self.images, self.annotations))
        return root / images, root / labels

    def names_image(self, file: Path, labels: Path) -> bool:
        """Tell whether a file among the images is one; where labels lie beside them, not these."""
        beside = self.annotation_suffix and file.is_relative_to(labels)
        if beside and file.name.endswith(f"{self.annotation_suffix}.png"):
            return False
        return file.suffix.lower() in EXTENSIONS and file.stem.endswith(self.image_suffix)

    def key(self, file: Path, images: Path) -> str:
        """Return what image and labels have in common: a path without suffix and extension."""
        return str(file.relative_to(images).with_suffix("")).removesuffix(self.image_suffix)


class LabelledFolder(FileSet[Pair]):
    """The images of one split, each with the PNG of its labels; read as shards are.

    Args:
        root: folder of all splits.
        split: name of the split.
        layout: where its images and labels lie.

    Raises:
        ValueError: a folder is absent or empty, or images have no labels.
    """

    def __init__(self, root: str | Path, split: str, layout: Layout | None = None) -> None:
        self.folder = Path(root)
        self.split = split
        layout = layout or Layout()
        images, labels = layout.folders(self.folder, split)
        for place, setting in ((images, "images"), (labels, "annotations")):
            if not place.is_dir():
                raise ValueError(
                    f"{place} is no folder: {root} needs {layout.images} and {layout.annotations}, "
                    f"with a PNG of class numbers for each image; name another split than {split}, "
                    f"or say with data.layout.{setting} where they lie."
                )
        found = (
            (layout.key(file, images), file)
            for file in sorted(images.rglob("*"))
            if layout.names_image(file, labels)
        )
        pairs = [
            Pair(key=key, image=file, labels=labels / f"{key}{layout.annotation_suffix}.png")
            for key, file in found
        ]
        self._items = [pair for pair in pairs if pair.image != pair.labels]
        lone = {pair.key for pair in pairs} - {pair.key for pair in self._items}
        if lone:
            raise ValueError(
                f"{images}: images and annotations have the same names, as {min(lone)}.png has: "
                "say with data.layout.image_suffix and annotation_suffix how they differ."
            )
        if not self._items:
            ending = f" whose names end with {layout.image_suffix}" if layout.image_suffix else ""
            raise ValueError(
                f"{images} holds no images{ending}: give a split with images, or fill it."
            )
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
