"""A folder tree as a source."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.files import SourceFile, UnreadableFileError


class FolderSource:
    """A folder of files, its subfolders included; links are followed, but not in circles."""

    chosen = False
    classes: tuple[str, ...] | None = None

    def __init__(self, path: Path, *, ordered: bool = False) -> None:
        self.path = path
        self._ordered = ordered

    def files(self) -> Iterator[SourceFile]:
        """Yield every file below the folder, in the order of their names if asked for."""
        yield from self._walk(self.path, "", frozenset({_identity(self.path)}))

    def _walk(
        self, folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]
    ) -> Iterator[SourceFile]:
        with os.scandir(folder) as found:
            entries: Iterable[os.DirEntry[str]] = found
            if self._ordered:
                entries = sorted(found, key=lambda entry: entry.name)
            for entry in entries:
                path = prefix + entry.name
                if entry.is_dir():
                    identity = _identity(Path(entry.path))
                    if identity not in ancestors:
                        yield from self._walk(Path(entry.path), path + "/", ancestors | {identity})
                elif entry.is_file():
                    status = entry.stat()
                    yield SourceFile(path, status.st_size, status.st_mtime_ns)
                else:
                    problem = "it is a broken link" if entry.is_symlink() else "it is not a file"
                    yield SourceFile(path, 0, 0, problem=problem)

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


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
