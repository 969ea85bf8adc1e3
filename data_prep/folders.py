"""A folder tree as a source."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from data_prep.external_sort import ExternalSort
from data_prep.files import SourceFile, UnreadableFileError

_SORTED_IN_MEMORY = 50_000


class FolderSource:
    """A folder of files, its subfolders included; links are followed, but not in circles."""

    chosen = False
    classes: tuple[str, ...] | None = None

    def __init__(self, path: Path, *, ordered: bool = False) -> None:
        self.path = path
        self._ordered = ordered
        self._prefix = os.path.join(path, "")  # noqa: PTH118 - joined to many names

    def files(self) -> Iterator[SourceFile]:
        """Yield every file below the folder, in the order of their paths if asked for."""
        for path in self._walk("", frozenset({_identity(self.path)}), ordered=self._ordered):
            yield self._measure(path)

    def outline(self) -> Iterator[SourceFile]:
        """Yield every file by its path alone, in any order."""
        for path in self._walk("", frozenset({_identity(self.path)}), ordered=False):
            yield SourceFile(path, 0, 0)

    def _walk(
        self, prefix: str, ancestors: frozenset[tuple[int, int]], *, ordered: bool
    ) -> Iterator[str]:
        with os.scandir(self.path / prefix) as found:
            entries: Iterable[tuple[str, bool]] = ((entry.name, entry.is_dir()) for entry in found)
            if ordered:
                entries = _sort(iter(entries))
            for name, is_folder in entries:
                if not is_folder:
                    yield prefix + name
                    continue
                identity = _identity(self.path / prefix / name)
                if identity not in ancestors:
                    below = ancestors | {identity}
                    yield from self._walk(f"{prefix}{name}/", below, ordered=ordered)

    def _measure(self, path: str) -> SourceFile:
        place = f"{self._prefix}{path}"
        try:
            status = os.stat(place)  # noqa: PTH116 - one call for each of many
        except FileNotFoundError:
            if not os.path.islink(place):  # noqa: PTH114
                raise
            return SourceFile(path, 0, 0, problem="it is a broken link")
        if not stat.S_ISREG(status.st_mode):
            return SourceFile(path, 0, 0, problem="it is not a file")
        return SourceFile(path, status.st_size, status.st_mtime_ns)

    def describe(self, path: str) -> tuple[int, int]:
        """Return the length of a file in bytes, and when it was changed.

        Raises:
            OSError: it is not there, or no file.
            ValueError: its name is impossible.
        """
        status = os.stat(self.path / path)  # noqa: PTH116 - one call for each of many
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        return status.st_size, status.st_mtime_ns

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a file.

        Raises:
            UnreadableFileError: it is gone or may not be read.
        """
        try:
            return (self.path / file.path).read_bytes()
        except OSError as error:
            raise UnreadableFileError(f"cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is held open."""


def _sort(entries: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield (name, is a folder) as the paths below sort; on disk where a folder holds very many."""
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


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
