"""Folders of image files, as datasets."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.channels import ChannelNames
from data_prep.format.kinds import (
    describe_examples,
)
from data_prep.format.labels import (
    SPLIT_NAMES,
    describe_doubts,
    find_doubtful_classes,
    folder_class,
)
from data_prep.format.text import count_noun
from simmim.data.datasets.image_set import ImageSet, ShardUnavailableError, read_patiently
from simmim.data.datasets.listing import (
    IMAGE_SUFFIXES,
    VANISHED,
    FolderListing,
    display_name,
    list_images,
)
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import BadSampleError, DataError
from simmim.environment import print_on_main

SHARD_FILES = 1_000
"""Maximum number of files per shard."""

MIN_SHARDS = 8
"""Minimum number of shards of a folder, unless it has fewer files."""

STAT_FILES = 1_024
"""Files whose sizes enter the digest: all of them would take minutes on a network disk."""

MAX_FILE_BYTES = 512 * 2**20
"""Largest file that is read; also the limit of `data-prep shard`."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image file, read on access."""

    folder: Path
    """The listed folder."""
    path: bytes
    """Path of the file relative to the folder."""
    label: int | None
    channels: ChannelNames | None = None
    """None: only the file itself may have them."""
    attempts: int
    """Attempts to read it if the folder is missing or the disk fails."""

    @property
    def shard_name(self) -> str:
        """Its folder, relative to the listed one."""
        return display_name(self.path.rpartition(b"/")[0]) or "."

    @property
    def key(self) -> str:
        """File name."""
        return display_name(self.path.rpartition(b"/")[2])

    @property
    def name(self) -> str:
        """Name in messages and random seed; independent of where the folder is."""
        return f"{self.shard_name}/{self.key}"

    @property
    def extension(self) -> str:
        """File name extension, in lower case and without the dot."""
        return self.key.rpartition(".")[2].lower()

    @property
    def image(self) -> bytes:
        """Content of the file.

        Raises:
            BadSampleError: it cannot be read, although the folder exists.
            DataError: the folder is missing.
        """
        try:
            return read_patiently(self._try_to_read, self.attempts)
        except BadSampleError:
            raise
        except DataError as error:
            if self.folder.is_dir():
                raise BadSampleError(str(error)) from None
            raise

    @property
    def about(self) -> bytes | None:
        """Content of the file of the same name with the suffix .json."""
        return replace(self, path=self._metadata).image if self.has_metadata else None

    @property
    def has_metadata(self) -> bool:
        """Whether there is a file of the same name with the suffix .json."""
        return os.path.exists(self._full_path(self._metadata))  # noqa: PTH110 - bytes

    @property
    def _metadata(self) -> bytes:
        return self.path.rpartition(b".")[0] + b".json"

    def _full_path(self, path: bytes) -> bytes:
        return os.path.join(os.fsencode(self.folder), path)  # noqa: PTH118 - names need not be text

    def _try_to_read(self) -> bytes:
        path = self._full_path(self.path)
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - names need not be text
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise BadSampleError(f"the file has more than {MAX_FILE_BYTES:,} bytes")
                return file.read()
        except OSError as error:
            # A missing file is one of many; a missing folder may come back.
            permanent = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            if permanent and self.folder.is_dir():
                raise BadSampleError(f"the file cannot be read: {error.strerror}") from None
            raise ShardUnavailableError(
                f"{display_name(path)} cannot be read ({error.strerror}): reconnect its disk"
            ) from None


class ImageFolder(ImageSet):
    """The images below a folder, in a fixed shuffle, divided evenly into shards.

    The class of an image is the folder that holds it, as in shards that `data-prep` makes of the
    same images; those directly in the listed folder have none. The listing is made once and
    determines everything: the files, their shuffle, and so which files the last shards hold out.

    Args:
        folder: the listed folder.
        listing: listing of the folder, with at least one image.
        attempts: attempts to read a file if the folder is missing or the disk fails.
    """

    def __init__(self, folder: Path, listing: FolderListing, *, attempts: int = 1) -> None:
        paths = [listing.paths[place] for place in shuffled(len(listing.paths), "folder").tolist()]
        folders = [path.rpartition(b"/")[0] for path in paths]
        classes = {folder: folder_class(os.fsdecode(folder)) for folder in set(folders)}
        names = sorted({name for name in classes.values() if name is not None})
        shards = min(len(paths), max(MIN_SHARDS, -(-len(paths) // SHARD_FILES)))
        super().__init__(folder, range(shards), [display_name(os.fsencode(name)) for name in names])
        self.attempts = attempts
        self._root = folder
        self._edges = [len(paths) * shard // shards for shard in range(shards + 1)]
        label_of: dict[str | None, int] = {name: label for label, name in enumerate(names)}
        labels = [label_of.get(classes[folder], -1) for folder in folders]
        self._all_labels = np.array(labels, np.int64)
        self._doubts = find_doubtful_classes(map(display_name, classes))
        self._tops = {display_name(name.partition(b"/")[0]) for name in classes if name}
        # One string rather than a million: workers share it without copying.
        self._paths = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        self._listed = _fingerprint(folder, paths)

    def require_labels(self) -> None:
        """Raise ValueError unless the folders are at least two classes, clear, and not splits."""
        if len(self._tops) > 1 and {name.lower() for name in self._tops} <= SPLIT_NAMES:
            raise ValueError(
                f"the folders in {self.folder} are called {' and '.join(sorted(self._tops))}, like"
                " splits of a dataset: give one of them, with one folder per class."
            )
        doubtful = [self._doubts[name] for name in self.classes if name in self._doubts]
        if doubtful:
            raise ValueError(
                "the class of an image is the folder that holds it, so classes are not clear in"
                f" {self.folder}: {describe_doubts(doubtful)}. Give a folder with one folder per"
                " class, or shards that `data-prep shard` makes of a list of paths and labels."
            )
        super().require_labels()

    def require_own_metadata(self) -> None:
        """Raise ValueError if two images of the folder would share their JSON: a.jpg, a.png."""
        first: dict[bytes, ImageFile] = {}
        for number in range(len(self._edges) - 1):
            for row in range(self._size(number)):
                image = self._read(number, row)
                other = first.setdefault(image.path.rpartition(b".")[0], image)
                if other is not image and image.has_metadata:
                    raise ValueError(
                        f"{other.name} and {image.name} in {self.folder} would share one JSON "
                        "file, as their names differ only after the dot: remove or rename one."
                    )

    def _size(self, number: int) -> int:
        return self._edges[number + 1] - self._edges[number]

    def _labels(self, number: int) -> NDArray[np.int64]:
        return self._all_labels[self._edges[number] : self._edges[number + 1]]

    def _read(self, number: int, row: int) -> ImageFile:
        index = self._edges[number] + row
        return ImageFile(
            folder=self._root,
            path=self._paths[self._ends[index] : self._ends[index + 1]],
            label=self._label(int(self._all_labels[index])),
            attempts=self.attempts,
        )

    def _name(self, number: int, row: int) -> str:
        return self._read(number, row).name

    def _fingerprint(self, number: int) -> str:
        return f"{number} of {self._listed}"


def open_folder(folder: Path, *, attempts: int = 1) -> ImageFolder:
    """List a folder of images, and report skipped entries on stderr.

    Raises:
        DataError: it contains no images, or cannot be read.
    """
    listing = list_images(folder)
    remarks = listing.remarks
    if not listing.paths:
        suffixes = " ".join(sorted(display_name(suffix) for suffix in IMAGE_SUFFIXES))
        raise DataError(
            f"{folder} contains neither shards nor images{f' ({remarks})' if remarks else ''}: give"
            " a folder of images, with one folder per class if there are classes, or of shards"
            f" made by `data-prep shard`. Image suffixes are {suffixes}."
        )
    if remarks:
        found = f"{folder}: {count_noun(len(listing.paths), 'image')}; {remarks}"
        named = describe_examples(listing.skipped, listing.examples.paths)
        print_on_main("\n  ".join([found, *named]))
    return ImageFolder(folder, listing, attempts=attempts)


def _fingerprint(folder: Path, paths: Sequence[bytes]) -> str:
    """Return a digest of all paths, and of the sizes of the first files.

    Raises DataError if the size of a file cannot be read: without it, the digest would differ.
    """
    digest = hashlib.sha256(b"\0".join(paths))
    for relative in paths[:STAT_FILES]:
        path = os.path.join(os.fsencode(folder), relative)  # noqa: PTH118 - names need not be text
        try:
            length = str(os.stat(path).st_size)  # noqa: PTH116
        except OSError as error:
            if error.errno not in VANISHED and not os.path.islink(path):  # noqa: PTH114
                raise DataError(
                    f"{display_name(path)} cannot be accessed ({error.strerror}): make its folder"
                    " readable, or remove it."
                ) from None
            length = "none"  # a broken link or removed; reading it will report it
        digest.update(f"\0{length}".encode())
    return digest.hexdigest()
