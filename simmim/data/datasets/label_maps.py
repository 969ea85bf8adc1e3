"""Images with label maps, in two parallel folders as in ADE20K."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.channels import ChannelNames
from simmim.data.datasets.local_files import FileSet, list_files, read_bytes
from simmim.recipe import settings

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy"})
"""File name suffixes of images, in lower case."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image and its label map, both encoded."""

    key: str
    """Path within the folder of the split, without extension."""
    shard_name: str
    image: bytes
    extension: str
    labels: bytes
    channels: ChannelNames | None = None
    """Names of its channels; None if only the file itself may have them."""

    @property
    def name(self) -> str:
        """Name in messages, and random seed."""
        return f"{self.shard_name}/{self.key}"


@dataclass(frozen=True, kw_only=True)
class ImageAndLabels:
    """Files of an image and its label map."""

    key: str
    image: Path
    labels: Path


@settings
class FolderLayout:
    """Folders and file names of images and label maps; ADE20K's by default."""

    images: str = "images/{split}"
    """Folder of a split's images, at any depth; {split} stands for the name of the split."""
    annotations: str = "annotations/{split}"
    """Folder of their label maps, under the same relative paths."""
    image_suffix: str = ""
    """End of image file names before the extension; `_leftImg8bit` in Cityscapes."""
    annotation_suffix: str = ""
    """End of label file names before `.png`, in place of `image_suffix`; `_gtFine_labelTrainIds` in
    Cityscapes."""

    def folders(self, root: Path, split: str) -> tuple[Path, Path]:
        """Return the folders of images and of label maps."""
        images, labels = (one.replace("{split}", split) for one in (self.images, self.annotations))
        return root / images, root / labels

    def names_image(self, file: Path, labels: Path) -> bool:
        """Return whether a file is an image; label maps in the same folder are not."""
        same_folder = self.annotation_suffix and file.is_relative_to(labels)
        if same_folder and file.name.endswith(f"{self.annotation_suffix}.png"):
            return False
        return file.suffix.lower() in SUFFIXES and file.stem.endswith(self.image_suffix)

    def key(self, file: Path, images: Path) -> str:
        """Return the path that image and label map share, without suffix and extension."""
        return str(file.relative_to(images).with_suffix("")).removesuffix(self.image_suffix)


class LabelledFolder(FileSet[LabelledImage, ImageAndLabels]):
    """The images of one split, each with a PNG label map.

    Args:
        root: folder of all splits.
        split: name of the split.
        layout: folders and file names.

    Raises:
        ValueError: a folder is missing or empty, or images have no label map, or share one.
    """

    def __init__(self, root: str | Path, split: str, layout: FolderLayout | None = None) -> None:
        self.folder = Path(root)
        self.split = split
        layout = layout or FolderLayout()
        images, labels = layout.folders(self.folder, split)
        for folder, setting in ((images, "images"), (labels, "annotations")):
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is not a folder: {root} needs {layout.images} and "
                    f"{layout.annotations}, with one PNG label map per image; choose another split "
                    f"than {split}, or set data.layout.{setting}."
                )
        found = (
            (layout.key(file, images), file)
            for file in sorted(images.rglob("*"))
            if layout.names_image(file, labels)
        )
        pairs = [
            ImageAndLabels(
                key=key, image=file, labels=labels / f"{key}{layout.annotation_suffix}.png"
            )
            for key, file in found
        ]
        self._items = [pair for pair in pairs if pair.image != pair.labels]
        lone = {pair.key for pair in pairs} - {pair.key for pair in self._items}
        if lone:
            raise ValueError(
                f"{images}: images and annotations have the same names, for example "
                f"{min(lone)}.png: set data.layout.image_suffix and annotation_suffix."
            )
        if not self._items:
            if layout.image_suffix:
                raise ValueError(
                    f"{images} contains no images whose names, without .jpg or the like, end with "
                    f"data.layout.image_suffix {layout.image_suffix}: change it, or choose another "
                    "split."
                )
            raise ValueError(f"{images} contains no images: choose another split.")
        self._check_shared()
        missing = [str(pair.labels) for pair in self._items if not pair.labels.is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._items)} images in {images} have no annotation: "
                f"missing {list_files(missing)}. Add them, or remove these images."
            )

    def _check_shared(self) -> None:
        first: dict[Path, Path] = {}
        for pair in self._items:
            other = first.setdefault(pair.labels, pair.image)
            if other != pair.image:
                raise ValueError(
                    f"{other} and {pair.image} would share the label map {pair.labels}, as their "
                    "names differ only after the dot: remove or rename one of them."
                )

    def _digest_parts(self) -> Iterator[bytes]:
        """Yield names and sizes of all files."""
        for pair in self._items:
            lengths = f"{pair.image.stat().st_size} {pair.labels.stat().st_size}"
            yield f"{pair.key} {lengths}\n".encode()

    def files(self) -> Iterator[Path]:
        """Yield the files of all images and label maps."""
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
