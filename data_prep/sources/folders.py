"""Folders as sources, local or remote."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from data_prep.format.kinds import Examples
from data_prep.format.storage import RemotePath
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import SourceError, SourceFile, UnreadableFileError

_CIRCULAR = "circular links"
_SORTED_IN_MEMORY = 50_000
_MAX_OPEN_FOLDERS = 64
_BROKEN_LINKS: dict[int | None, str] = {
    errno.ENOENT: "it is a broken link",
    errno.ELOOP: "it is a link that leads back to itself",
}
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
VANISHED = "vanished while listed"
"""Kind of files and folders that were removed while their folder was listed."""
_ODD_LINK = "it is a link that cannot be followed"


class FolderSource:
    """A local folder with its subfolders; links are followed, except in circles.

    Args:
        path: the folder.
        ordered: whether files are listed in the order of their paths.
        without: a folder that must not be inside it, even through links.
    """

    is_explicit = False
    classes: tuple[str, ...] | None = None

    def __init__(self, path: Path, *, ordered: bool = False, without: Path | None = None) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self.examples = Examples()
        self._ordered, self._without = ordered, without
        self._prefix = os.path.join(path, "")  # noqa: PTH118 - joined to many names

    def files(self) -> Iterator[SourceFile]:
        """Yield every file in the folder tree, in the order of their paths if `ordered`.

        Raises:
            SourceError: the folder `without` is inside it.
        """
        self.skipped.clear()
        for path in self._walk(ordered=self._ordered):
            file = self._measure(path)
            if file is None:
                self.skipped[VANISHED] += 1
            else:
                yield file

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield every file without size and stamp, in any order."""
        self.skipped.clear()
        for path in self._walk(ordered=False):
            yield SourceFile(path, 0, 0)

    def _walk(self, *, ordered: bool) -> Iterator[str]:
        """Yield the path of every file; iterative, so that the depth is not limited."""
        refused = _identity(self._without) if self._without and self._without.exists() else None
        identity = _identity(self.path)
        open_folders = [("", identity, self._entries("", ordered=ordered))]
        ancestors = {identity}
        while open_folders:
            prefix, identity, entries = open_folders[-1]
            try:
                entry = next(entries, None)
            except OSError as error:
                self._count_vanished(error, prefix)
                entry = None
            if entry is None:
                open_folders.pop()
                ancestors.remove(identity)
                continue
            name, is_folder = entry
            if not is_folder:
                yield prefix + name
                continue
            below = f"{prefix}{name}/"
            try:
                identity = _identity(self.path / below)
            except OSError as error:
                self._count_vanished(error, below)
                continue
            if identity == refused:
                raise SourceError(
                    f"{self.path / below} in the source is the output folder. Give one outside of "
                    "the source."
                )
            if identity in ancestors:
                self.skipped[_CIRCULAR] += 1
                self.examples.add(_CIRCULAR, below)
            else:
                if len(open_folders) >= _MAX_OPEN_FOLDERS:  # limit the open file descriptors
                    open_folders[-1] = (*open_folders[-1][:2], iter(list(entries)))
                open_folders.append((below, identity, self._entries(below, ordered=ordered)))
                ancestors.add(identity)

    def _count_vanished(self, error: OSError, prefix: str) -> None:
        """Count a folder that was removed meanwhile; other errors would hide files."""
        if not prefix or error.errno not in _VANISHED:
            raise error
        self.skipped[VANISHED] += 1

    def _entries(self, prefix: str, *, ordered: bool) -> Iterator[tuple[str, bool]]:
        """Yield (name, is a folder) for the entries of a folder."""
        with os.scandir(self.path / prefix) as found:
            entries = ((entry.name, _is_folder(entry)) for entry in found)
            yield from _sort(entries) if ordered else entries

    def _measure(self, path: str) -> SourceFile | None:
        """Return a file with size and stamp, or None if it was removed meanwhile."""
        place = f"{self._prefix}{path}"
        try:
            status = os.stat(place)  # noqa: PTH116 - one call for each of many
        except OSError as error:
            if not os.path.islink(place):  # noqa: PTH114
                if error.errno in _VANISHED:
                    return None
                raise
            return SourceFile(path, 0, 0, problem=_BROKEN_LINKS.get(error.errno, _ODD_LINK))
        if not stat.S_ISREG(status.st_mode):
            return SourceFile(path, 0, 0, problem="it is not a file")
        return SourceFile(path, status.st_size, status.st_mtime_ns)

    def size_and_stamp(self, path: str) -> tuple[int, int]:
        """Return the length of a file in bytes and its modification time.

        Raises:
            OSError: it is missing or not a file.
            ValueError: its name is invalid.
        """
        status = os.stat(self.path / path)  # noqa: PTH116 - one call for each of many
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        return status.st_size, status.st_mtime_ns

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a file.

        Raises:
            UnreadableFileError: it is missing or may not be read.
        """
        try:
            return (self.path / file.path).read_bytes()
        except OSError as error:
            raise UnreadableFileError(f"cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is held open."""


def _sort(entries: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield (name, is a folder) in the order of the paths; sorted on disk if there are many."""
    first = list(islice(entries, _SORTED_IN_MEMORY))
    if len(first) < _SORTED_IN_MEMORY:
        yield from sorted(first, key=lambda entry: _sort_key(*entry))
        return
    with TemporaryDirectory(prefix="data-prep-") as scratch:
        sorter = ExternalSort(Path(scratch), "names")
        for name, is_folder in chain(first, entries):
            sorter.add(_sort_key(name, is_folder).hex(), "")
        del first
        for key, _ in sorter.merged():
            name = os.fsdecode(bytes.fromhex(key))
            yield name.removesuffix("/"), name.endswith("/")


def _sort_key(name: str, is_folder: bool) -> bytes:
    return os.fsencode(name) + b"/" * is_folder


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, which is reported when it is measured
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


class RemoteFolderSource:
    """A folder at a URL with its subfolders, listed in the order of their names."""

    is_explicit = False
    classes: tuple[str, ...] | None = None

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self.examples = Examples()

    def files(self) -> Iterator[SourceFile]:
        """Yield every file.

        Raises:
            StorageError: the store does not answer.
        """
        for path, size, stamp in self.path.walk():
            yield SourceFile(path, size, stamp)

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield every file; listing a store gives their sizes too."""
        return self.files()

    def size_and_stamp(self, path: str) -> tuple[int, int]:
        """Return the length of a file in bytes and a stamp that changes with its content.

        Raises:
            FileNotFoundError: it is missing.
            StorageError: the store does not answer.
        """
        return (self.path / path).size_and_stamp()

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a file.

        Raises:
            UnreadableFileError: it is missing or may not be read.
            StorageError: the store does not answer.
        """
        try:
            return (self.path / file.path).read_bytes()
        except OSError as error:
            reason = error.strerror or "it is not there"
            raise UnreadableFileError(f"cannot be read: {reason}") from None

    def close(self) -> None:
        """Nothing is held open."""
