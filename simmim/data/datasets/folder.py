"""Folders of image files, as datasets."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.datasets.image_set import ImageSet
from simmim.data.datasets.listing import IMAGE_SUFFIXES, FolderListing, display_name, list_images
from simmim.data.datasets.retry import ShardUnavailableError, retry
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import BadSampleError, DataError

SHARD_FILES = 1_000
"""Most files per shard."""

MIN_SHARDS = 8
"""Fewest shards of a folder, unless it has fewer files."""

STAT_FILES = 1_024
"""Files whose sizes enter the digest: all of them would take minutes on a network disk."""

MAX_FILE_BYTES = 512 * 2**20
"""Largest file that is read; also the limit of `data-prep shard`."""

SPLIT_NAMES = frozenset({"test", "train", "training", "val", "valid", "validation"})
"""Folder names of splits; taken as classes only next to other names."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image file, read on access."""

    folder: Path
    """The listed folder."""
    path: bytes
    """Path of the file relative to the folder."""
    label: int | None
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
            return retry(self._try_to_read, self.attempts)
        except BadSampleError:
            raise
        except DataError as error:
            if self.folder.is_dir():
                raise BadSampleError(str(error)) from None
            raise

    @property
    def about(self) -> bytes | None:
        """Content of the file of the same name with the suffix .json."""
        metadata = self.path.rpartition(b".")[0] + b".json"
        if not os.path.exists(self._full_path(metadata)):  # noqa: PTH110 - bytes
            return None
        return replace(self, path=metadata).image

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

    The class of an image is the first folder on its path, as in torchvision's `ImageFolder`;
    images directly in the folder have none. The listing is made once and determines everything:
    the files, their shuffle, and so which files the last shards hold out.

    Args:
        folder: the listed folder.
        listing: its listing, of at least one image.
        attempts: attempts to read a file if the folder is missing or the disk fails.
    """

    def __init__(self, folder: Path, listing: FolderListing, *, attempts: int = 1) -> None:
        paths = [listing.paths[place] for place in shuffled(len(listing.paths), "folder").tolist()]
        class_folders = [path[: max(0, path.find(b"/"))] for path in paths]
        names = sorted({display_name(folder) for folder in class_folders if folder})
        shards = min(len(paths), max(MIN_SHARDS, -(-len(paths) // SHARD_FILES)))
        super().__init__(folder, range(shards), names)
        self.attempts = attempts
        self._root = folder
        self._edges = [len(paths) * shard // shards for shard in range(shards + 1)]
        label_of = {name: label for label, name in enumerate(names)}
        labels = [label_of.get(display_name(folder), -1) for folder in class_folders]
        self._all_labels = np.array(labels, np.int64)
        # One string rather than a million: workers share it without copying.
        self._paths = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        self._listed = _fingerprint(folder, paths)

    def require_labels(self) -> None:
        """Raise ValueError unless the folders are at least two classes, and not splits."""
        super().require_labels()
        if {name.lower() for name in self.classes} <= SPLIT_NAMES:
            raise ValueError(
                f"the folders in {self.folder} are called {' and '.join(self.classes)}, like splits"
                " of a dataset rather than classes: give one of them, with one folder per class."
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
    if remarks and int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"{folder}: {len(listing.paths):,} images; {remarks}\n")
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
            if not isinstance(error, FileNotFoundError) and not os.path.islink(path):  # noqa: PTH114
                raise DataError(
                    f"{display_name(path)} cannot be accessed ({error.strerror}): make its folder"
                    " readable, or remove it."
                ) from None
            length = "none"  # a broken link; reading it will report it
        digest.update(f"\0{length}".encode())
    return digest.hexdigest()
