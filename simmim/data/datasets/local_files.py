"""Lists of files on this machine, as sources of samples."""

from abc import abstractmethod
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Generic, TypeVar

from typing_extensions import Self

from simmim.data.order.randomness import choose_share
from simmim.data.order.source import DataError, Encoded_co, SampleSource

SHARD_FILES = 256
"""Files per shard, the unit that the order of large datasets shuffles."""

NAMED = 5
"""Maximum number of files listed in a message."""

Item = TypeVar("Item")


class LocalFiles(SampleSource[Encoded_co]):
    """A list of files in a folder."""

    classes: tuple[str, ...] = ()
    folder: Path
    """Folder or file in which they were listed, for messages."""

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """Yield every file that samples are read from."""

    def folder_of(self, shard: int) -> str:
        """Return the folder of a shard, for messages."""
        del shard
        return str(self.folder)


class FileSet(LocalFiles[Encoded_co], Generic[Encoded_co, Item]):
    """A list of items, each of one or more files, in shards of `SHARD_FILES`."""

    _items: list[Item]

    @property
    def sizes(self) -> list[int]:
        """Number of images in each shard."""
        total = len(self._items)
        return [min(SHARD_FILES, total - first) for first in range(0, total, SHARD_FILES)]

    def share(self, share: float, *, seed: int) -> Self:
        """Return a fraction of the images, in order; see `choose_share`."""
        selection = copy(self)
        chosen = choose_share(len(self._items), share, seed).tolist()
        selection._items = [self._items[index] for index in chosen]
        return selection

    def item(self, shard: int, sample: int) -> Item:
        """Return the item of a sample."""
        return self._items[shard * SHARD_FILES + sample]


def read_bytes(file: Path) -> bytes:
    """Return the content of a file. Raises DataError naming it if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def list_files(files: list[str]) -> str:
    """Return the first `NAMED` files, for a message."""
    return f"{', '.join(files[:NAMED])}{' ...' if files[NAMED:] else ''}"
