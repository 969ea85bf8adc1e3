"""Folders of images, read file by file as shards are read."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from simmim.data.datasets.listing import IMAGE_SUFFIXES, Listing, list_images, shown
from simmim.data.datasets.retry import ShardAmissError, patiently
from simmim.data.datasets.samples import SampleSet
from simmim.data.order.errors import BadSampleError, DataError
from simmim.data.order.randomness import shuffled

PART_FILES = 1_000
"""Most files of a folder that count as a shard."""

FEWEST_PARTS = 8
"""Shards that a folder counts as at least, unless it has fewer files."""

MEASURED_FILES = 1_024
"""Files whose lengths are noted: to ask for all would take minutes on a network disk."""

MOST_BYTES = 512 * 2**20
"""Length of the largest file that is read; `data-prep shard` takes none that is larger."""

SPLIT_NAMES = frozenset({"test", "train", "training", "val", "valid", "validation"})
"""Names that stand for parts of a data set, and for classes only beside other names."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image as a file of its own, which is read when it is asked for."""

    folder: Path
    """What is listed."""
    path: bytes
    """Of the file, relative to the folder."""
    label: int | None
    attempts: int
    """Times that reading is tried where the folder is gone or the disk fails."""

    @property
    def shard_name(self) -> str:
        """The folder it lies in, relative to the one that is listed."""
        return shown(self.path.rpartition(b"/")[0]) or "."

    @property
    def key(self) -> str:
        """Name of the file."""
        return shown(self.path.rpartition(b"/")[2])

    @property
    def name(self) -> str:
        """What messages call it, and what seeds its randomness: the same wherever the folder is."""
        return f"{self.shard_name}/{self.key}"

    @property
    def extension(self) -> str:
        """Suffix of its name."""
        return self.key.rpartition(".")[2].lower()

    @property
    def image(self) -> bytes:
        """The bytes of the file.

        Raises:
            BadSampleError: it cannot be read, though the folder is there.
            DataError: the folder is gone.
        """
        try:
            return patiently(self._try_to_read, self.attempts)
        except BadSampleError:
            raise
        except DataError as error:
            if self.folder.is_dir():
                raise BadSampleError(str(error)) from None
            raise

    @property
    def about(self) -> bytes | None:
        """The bytes of the file of the same name that ends in .json."""
        beside = self.path.rpartition(b".")[0] + b".json"
        if not os.path.exists(self._place(beside)):  # noqa: PTH110 - bytes
            return None
        return replace(self, path=beside).image

    def _place(self, path: bytes) -> bytes:
        return os.path.join(os.fsencode(self.folder), path)  # noqa: PTH118 - names need not be text

    def _try_to_read(self) -> bytes:
        place = self._place(self.path)
        try:
            with open(place, "rb") as file:  # noqa: PTH123 - names need not be text
                if os.fstat(file.fileno()).st_size > MOST_BYTES:
                    raise BadSampleError(f"the file has more than {MOST_BYTES:,} bytes")
                return file.read()
        except OSError as error:
            # A file that is gone is one of many; a folder that is gone may come back.
            lasting = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            if lasting and self.folder.is_dir():
                raise BadSampleError(f"the file cannot be read: {error.strerror}") from None
            raise ShardAmissError(
                f"{shown(place)} cannot be read ({error.strerror}): bring its disk back"
            ) from None


class ImageFolder(SampleSet):
    """The images below a folder, in the order of a fixed shuffle, cut evenly into shards.

    The class of an image is the first folder on its path, as torchvision's `ImageFolder` has it;
    images right in the folder have none. The listing is made once and decides everything: which
    files there are, how they are shuffled, and so which ones the last shards hold out.

    Args:
        folder: that was listed.
        listing: of at least one image.
        attempts: times that reading is tried where the folder is gone or the disk fails.
    """

    def __init__(self, folder: Path, listing: Listing, *, attempts: int = 1) -> None:
        paths = [listing.paths[place] for place in shuffled(len(listing.paths), "folder").tolist()]
        owners = [path[: max(0, path.find(b"/"))] for path in paths]
        names = sorted({shown(owner) for owner in owners if owner})
        parts = min(len(paths), max(FEWEST_PARTS, -(-len(paths) // PART_FILES)))
        super().__init__(folder, range(parts), names)
        self.attempts = attempts
        self._root = folder
        self._edges = [len(paths) * part // parts for part in range(parts + 1)]
        places = {name: label for label, name in enumerate(names)}
        self._all_labels = np.array([places.get(shown(owner), -1) for owner in owners], np.int64)
        # One string and not a million, which workers share without copying.
        self._paths = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        self._listed = _fingerprint(folder, paths)

    def require_labels(self) -> None:
        """Raise ValueError unless the images have at least two classes, and not parts of a set."""
        super().require_labels()
        if {name.lower() for name in self.classes} <= SPLIT_NAMES:
            raise ValueError(
                f"the folders in {self.folder} are called {' and '.join(self.classes)}, as the"
                " parts of a data set are and not its classes: name one of them, with a folder for"
                " each class"
            )

    def _size(self, number: int) -> int:
        return self._edges[number + 1] - self._edges[number]

    def _labels(self, number: int) -> np.ndarray:
        return self._all_labels[self._edges[number] : self._edges[number + 1]]

    def _read(self, number: int, row: int) -> ImageFile:
        place = self._edges[number] + row
        return ImageFile(
            folder=self._root,
            path=self._paths[self._ends[place] : self._ends[place + 1]],
            label=self._label(int(self._all_labels[place])),
            attempts=self.attempts,
        )

    def _name(self, number: int, row: int) -> str:
        return self._read(number, row).name

    def _fingerprint(self, number: int) -> str:
        return f"{number} of {self._listed}"


def open_folder(folder: Path, *, attempts: int = 1) -> ImageFolder:
    """List a folder of images, and say on stderr what in it is not used.

    Raises:
        DataError: it holds no images, or cannot be read.
    """
    listing = list_images(folder)
    remarks = listing.remarks
    if not listing.paths:
        suffixes = " ".join(sorted(shown(suffix) for suffix in IMAGE_SUFFIXES))
        raise DataError(
            f"{folder} holds neither shards nor images{f' ({remarks})' if remarks else ''}: name a"
            " folder of images, with a folder for each class where there are classes, or one of"
            f" shards that `data-prep shard` made; image suffixes are {suffixes}"
        )
    if remarks and int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"{folder}: {len(listing.paths):,} images; {remarks}\n")
    return ImageFolder(folder, listing, attempts=attempts)


def _fingerprint(folder: Path, paths: Sequence[bytes]) -> str:
    """Return a digest of all paths, and of the lengths of the first files.

    Raises DataError where a file cannot be asked for its length: without it, the digest would be
    another one.
    """
    digest = hashlib.sha256(b"\0".join(paths))
    for path in paths[:MEASURED_FILES]:
        place = os.path.join(os.fsencode(folder), path)  # noqa: PTH118 - names need not be text
        try:
            length = str(os.stat(place).st_size)  # noqa: PTH116
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and not os.path.islink(place):  # noqa: PTH114
                raise DataError(
                    f"{shown(place)} cannot be looked at ({error.strerror}): make its folder"
                    " readable, or take it away"
                ) from None
            length = "none"  # a broken link, as reading it will show
        digest.update(f"\0{length}".encode())
    return digest.hexdigest()
