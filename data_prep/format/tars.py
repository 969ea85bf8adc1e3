"""Uncompressed tars from any source, read without trusting them, and fetched if remote."""

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from data_prep.format.pipes import PipedFile
from data_prep.format.storage import Location, RemotePath


class TarError(ValueError):
    """A tar is compressed, cut or damaged."""


def walk_tar(
    path: Location, *, start: int = 0, length: int | None = None
) -> Iterator[tarfile.TarInfo]:
    """Yield every member of an uncompressed tar in order, in constant memory.

    Args:
        path: a file.
        start: offset of the tar in the file, in bytes; member offsets are relative to it.
        length: length of the tar in bytes; None is the rest of the file.

    Raises:
        TarError: the file is not a tar, is compressed, is truncated, or loops back on itself.
    """
    try:
        with path.open("rb") as file:
            stream = file if length is None else _Part(file, start, length)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                offset = -1
                for member in tar:
                    # A negative size would make tarfile read the same header forever.
                    if member.size < 0 or member.offset <= offset:
                        raise TarError(
                            f"{path} is damaged: member {member.name!r} has an impossible size. "
                            "Fetch or write it again."
                        )
                    offset = member.offset
                    yield member
                    tar.members.clear()  # type: ignore[attr-defined]
    except (tarfile.TarError, OverflowError, ValueError) as error:
        if isinstance(error, TarError):
            raise
        raise TarError(_describe(path, error)) from None


class _Part(io.RawIOBase):
    """A byte range of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._position)
        data = self._file.read(size)
        self._position += len(data)
        return data


def open_part(file: IO[bytes], start: int, length: int) -> IO[bytes]:
    """Return a byte range of an open file as a file of its own."""
    return cast(IO[bytes], _Part(file, start, length))


def is_tar(path: Location) -> bool:
    """Return whether a file is an uncompressed tar."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:"):
            return True
    except tarfile.TarError:
        return False


def describe_problem(member: tarfile.TarInfo) -> str | None:
    """Return why a member must not be used, or None for a regular file with a safe path."""
    if member.issym() or member.islnk():
        return "it is a link"
    if member.issparse():
        return "it is a sparse file"
    if not member.isreg():
        return "it is not a regular file"
    return describe_path_problem(member.name)


def describe_path_problem(name: str) -> str | None:
    """Return why the path of an archive member is unsafe, or None."""
    if name[:1] != "/" and ".." not in name:
        return None  # nearly always, and much faster than splitting the path
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "its path leads out of the archive"
    return None


def _describe(path: Location, error: Exception) -> str:
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*"):
            compressed = not is_tar(path)
    except (tarfile.TarError, OSError, EOFError):
        compressed = False
    if compressed:
        return (
            f"{path} is a compressed tar, which allows no random access: decompress it first "
            "(gunzip, xz -d or zstd -d)."
        )
    return f"{path} is truncated, damaged or not a tar ({error}). Fetch or write it again."


@contextmanager
def as_local_file(place: Location | PipedFile) -> Iterator[Path]:
    """Yield the path of a local file; a remote one is first downloaded to the temporary folder.

    Raises:
        StorageError: the file cannot be fetched.
        TarError: raised in the block; the path of the copy is replaced by the file's own.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        copy = Path(folder, place.name)
        with copy.open("wb") as file:
            file.writelines(place.blocks())
        try:
            yield copy
        except TarError as error:
            raise TarError(str(error).replace(str(copy), str(place))) from None


@contextmanager
def open_seekable(place: Location | PipedFile) -> Iterator[BinaryIO]:
    """Open a file for random reads: by range requests if possible, otherwise downloaded first."""
    if isinstance(place, RemotePath) and place.supports_ranges():
        with place.open("rb") as file:
            yield file
    else:
        with as_local_file(place) as path, path.open("rb") as file:
            yield file
