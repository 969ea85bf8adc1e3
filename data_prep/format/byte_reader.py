"""Bytes of a file at any place in it, on this machine or in a store."""

import os
from pathlib import Path

from data_prep.format.storage import Location, RemotePath

_AHEAD = 2**22


class ByteReader:
    """Reads parts of one file; from a store ahead, as long as parts follow one another.

    Raises:
        OSError: the file is not there or cannot be read.
        StorageError: the store does not answer, or sends whole files only.
    """

    def __init__(self, path: Location) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY) if isinstance(path, Path) else -1
        self._size = -1
        self._held, self._held_from = b"", 0

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer where the file ends before."""
        if isinstance(self._path, Path):
            return os.pread(self._descriptor, size, offset)
        return self._fetch(self._path, offset, size)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _fetch(self, path: RemotePath, offset: int, size: int) -> bytes:
        if self._size < 0:
            self._size = path.stat().st_size
        size = max(0, min(size, self._size - offset))
        held_to = self._held_from + len(self._held)
        if not (self._held_from <= offset and offset + size <= held_to):
            # A part that begins just behind the last one is one of many in a row.
            follows = self._held and self._held_from <= offset <= held_to + _AHEAD // 4
            length = max(size, _AHEAD) if follows else size
            self._held = path.read_range(offset, min(length, self._size - offset)) if size else b""
            self._held_from = offset
        start = offset - self._held_from
        return self._held[start : start + size]
