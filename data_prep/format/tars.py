"""Uncompressed tars from any source, read without trusting them, and fetched if remote."""

import os
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from data_prep.format.atomic import name_in_errors
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import Location, RangeFile, RemotePath
from data_prep.format.stores import StorageError


class TarError(ValueError):
    """A tar is compressed, cut or damaged."""


_BLOCK = tarfile.BLOCKSIZE
_END_BYTES = 2 * _BLOCK
"""Length of the end mark: two blocks of zeros."""
_READ_BYTES = 2**20
_STREAM_BYTES = 2**15
"""Bytes asked for at a time of a tar that is read once: tarfile copies the rest at every read."""
MOST_PADDING = 2**24
"""Longest run of zeros behind the members of a tar that is read once."""
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}
"""First bytes of compressed files, and the command that decompresses them."""

Warn = Callable[[str], object]
"""Takes the description of something that is unusual and allowed."""


def walk_tar(
    path: Location, *, start: int = 0, length: int | None = None, missing_end: Warn | None = None
) -> Generator[tarfile.TarInfo, None, None]:
    """Yield every member of an uncompressed tar in order, in constant memory.

    Once all members are read the tar must end as tars do, with two blocks of zeros and at a
    multiple of 512 bytes: one that is cut between two members looks whole otherwise.

    Args:
        path: a file.
        start: offset of the tar in the file, in bytes; member offsets are relative to it.
        length: length of the tar in bytes; None is the rest of the file.
        missing_end: called with a description of a tar that holds whole members but lacks the end
            mark, as some programs write them; None: such a tar is an error.

    Raises:
        TarError: the file is not a tar, is compressed, is truncated, or loops back on itself.
        StorageError: the store does not answer, or sends whole files only.
    """
    try:
        with path.open("rb") as file:
            stream = _part(file, start, _length_of(file) - start if length is None else length)
            yield from _walk(path, stream, missing_end)
    except (tarfile.TarError, OverflowError, ValueError) as error:
        if isinstance(error, TarError | StorageError):
            raise
        with path.open("rb") as file:
            head = file.read(8)
        raise TarError(_describe(path, head, error)) from None


def stream_tar(
    place: object, blocks: Iterator[bytes]
) -> Generator[tuple[tarfile.TarInfo, Callable[[], bytes]], None, None]:
    """Yield every member of an uncompressed tar that is read once, from its first byte to its last.

    What `walk_tar` refuses is refused here, but only where it is met: the members before it have
    been yielded.

    Args:
        place: what the tar is called in messages.
        blocks: the bytes of the tar.

    Yields:
        A member, and a function that returns its bytes until the next one is asked for.

    Raises:
        TarError: see `walk_tar`.
        Exception: what `blocks` raises.
    """
    stream, last = _SequentialFile(blocks), -1
    try:
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", bufsize=_STREAM_BYTES) as tar:
            for member in tar:
                if member.size < 0 or member.offset <= last:
                    raise TarError(_impossible(place, member))
                last = member.offset
                yield member, partial(_read_member, place, tar, member)
                tar.members.clear()  # type: ignore[attr-defined]
            end = tar.offset
    except (tarfile.TarError, OverflowError, ValueError) as error:
        if isinstance(error, TarError) or error is stream.failure:
            raise
        raise TarError(_describe(place, stream.head, error)) from None
    stream.drain(end + MOST_PADDING)
    if stream.data_end > end or stream.position > end + MOST_PADDING:
        raise TarError(
            f"{place} is damaged: there is no header of a member at byte {end:,}, and the tar goes "
            "on behind it. Fetch or write it again."
        )
    if stream.position < end + _END_BYTES or stream.position % _BLOCK:
        raise TarError(
            f"{place} is truncated: it does not end with two blocks of zeros, at a multiple of 512 "
            "bytes, so members may be missing. Fetch or write it again."
        )


def _read_member(place: object, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        data = b"" if file is None else file.read()
    except tarfile.TarError:
        data = b""
    if len(data) < member.size:
        raise TarError(
            f"{place} is truncated: it ends within member {member.name!r}. Fetch or write it again."
        )
    return data


class _SequentialFile:
    """A file that is read from beginning to end, of whose bytes only the last are kept.

    Attributes:
        head: its first bytes.
        position: number of bytes read.
        data_end: position behind the last byte that is not zero.
        failure: the error that ended `blocks`, if one did.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")
        self.head, self.position, self.data_end = b"", 0, 0
        self.failure: Exception | None = None

    def read(self, size: int) -> bytes:
        """Return the next bytes, fewer than `size` at the end of a block or of the file."""
        while not self._rest:
            try:
                block = next(self._blocks, None)
            except Exception as error:
                self.failure = error
                raise
            if block is None:
                return b""
            self._rest = memoryview(block)
        data = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        self.head = self.head or data[:8]
        if filled := len(data.rstrip(b"\0")):
            self.data_end = self.position + filled
        self.position += len(data)
        return data

    def drain(self, stop: int) -> None:
        """Read to the end, or until behind a position."""
        while self.position <= stop and self.read(_READ_BYTES):
            pass


def _impossible(place: object, member: tarfile.TarInfo) -> str:
    return (
        f"{place} is damaged: member {member.name!r} has an impossible size. Fetch or write it "
        "again."
    )


def _walk(path: Location, stream: RangeFile, missing_end: Warn | None) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, then check its end."""
    place, member = -1, None
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        try:
            for member in tar:
                # A negative size would make tarfile read the same header forever.
                if member.size < 0 or member.offset <= place:
                    raise TarError(_impossible(path, member))
                place = member.offset
                yield member
                tar.members.clear()  # type: ignore[attr-defined]
        except tarfile.ReadError:
            # The file ends before the block after a member: its data may be whole nevertheless.
            if member is None or not _only_padding_is_missing(member, stream.size):
                raise
            _refuse_or_warn(path, "its last block is not filled up", missing_end)
            return
        _check_end(path, stream, tar.offset, missing_end)


def _only_padding_is_missing(last: tarfile.TarInfo, length: int) -> bool:
    stop = last.offset_data + last.size
    return not last.issparse() and stop <= length < stop + -stop % _BLOCK


def _check_end(path: Location, stream: RangeFile, offset: int, missing_end: Warn | None) -> None:
    """Check what follows the last member: tarfile stops at anything that is not a header.

    Raises:
        TarError: it is not an end mark, or there is more behind it.
    """
    stream.seek(offset)
    tail = stream.read(_END_BYTES)
    header = tail[:_BLOCK]
    if any(header):
        what = (
            "is damaged: there is no header of a member at"
            if len(header) == _BLOCK
            else ("is truncated: it ends within the header of a member, at")
        )
        raise TarError(f"{path} {what} byte {offset:,}. Fetch or write it again.")
    if any(tail) or any(any(block) for block in iter(lambda: stream.read(_READ_BYTES), b"")):
        raise TarError(
            f"{path} has data behind its end, at byte {offset:,}, where readers of tars stop: it "
            "may be several tars one after another. Unpack it with `tar --ignore-zeros` and write "
            "it again."
        )
    if len(tail) < _END_BYTES:
        _refuse_or_warn(path, "it has no end mark (two blocks of zeros)", missing_end)
    elif stream.size % _BLOCK:
        _refuse_or_warn(
            path, f"its length of {stream.size:,} bytes is not a multiple of 512", missing_end
        )


def _refuse_or_warn(path: Location, problem: str, missing_end: Warn | None) -> None:
    if missing_end is None:
        raise TarError(
            f"{path} is truncated: {problem}, so members may be missing. Fetch or write it again; "
            "if the program that wrote it leaves the end out, allow it with --allow-missing-end."
        )
    missing_end(f"{path}: {problem}; accepted as complete, as allowed")


def _length_of(file: IO[bytes]) -> int:
    return file.seek(0, os.SEEK_END)


def open_part(file: IO[bytes], start: int, length: int) -> IO[bytes]:
    """Return a byte range of an open file as a file of its own."""
    return cast(IO[bytes], _part(file, start, length))


def _part(file: IO[bytes], start: int, length: int) -> RangeFile:
    def read_at(offset: int, size: int) -> bytes:
        file.seek(start + offset)
        return file.read(size)

    return RangeFile(read_at, length)


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


def _describe(path: object, head: bytes, error: Exception) -> str:
    for mark, command in _COMPRESSED.items():
        if head.startswith(mark):
            return (
                f"{path} is a compressed tar, which allows no random access: decompress it first "
                f"({command})."
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
        with name_in_errors(copy), copy.open("wb") as file:
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
