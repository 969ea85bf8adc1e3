"""Archives that allow no random access (compressed tars, deflated members), unpacked into files.

The copies are shared by all processes of a run and limited in length, so that a decompression bomb
is refused before it fills the disk.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from data_prep.format.atomic import name_in_errors
from data_prep.format.storage import Location, RemotePath
from data_prep.format.stores import StorageError
from data_prep.format.text import format_bytes
from data_prep.sources.zip_methods import MemberDataError, MemberDecoder

MIN_LIMIT = 2**30
"""Bytes that the archives in an archive may have in total, however small it is."""
MAX_RATIO = 200
"""Bytes that they may have for each byte of the archive, if that is more."""

_BLOCK = 2**20
# As few bytes as tell them from tars, which begin with the name of a member.
_OPENERS: dict[re.Pattern[bytes], Any] = {
    re.compile(rb"\x1f\x8b"): gzip.GzipFile,
    re.compile(rb"BZh[1-9]1AY&SY"): bz2.BZ2File,
    re.compile(rb"\xfd7zXZ\0"): lzma.LZMAFile,
    re.compile(rb"\x5d\0\0(?!\0\0)"): lzma.LZMAFile,
}
_ZSTD = b"\x28\xb5\x2f\xfd"
HEAD_BYTES = 10
"""First bytes of a file that tell how it is compressed."""


class UnpackError(ValueError):
    """An archive cannot be unpacked; the message is a clause."""


class UnpackedFiles:
    """Unpacked copies of archives in one source, in a folder that all processes share.

    Args:
        source: the source; copies of an earlier version of it are not used.
        folder: folder of the copies, which are left there; None: a temporary one.
    """

    def __init__(self, source: Location, folder: Path | None) -> None:
        self._source, self._folder = source, folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._identity: tuple[int, int] | None = None
        self._total = 0

    def path(self, container: str) -> Path:
        """Return the path of the copy of an archive, whether it exists or not."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="data-prep-")
            self._folder = Path(self._temporary.name)
        size, stamp = self._identify()
        key = f"{size} {stamp} {container}".encode("utf-8", "surrogateescape")
        return self._folder / f"unpacked-{hashlib.sha256(key).hexdigest()[:24]}"

    def forget(self) -> None:
        """Count lengths from zero again, before the source is listed again."""
        self._total = 0

    def count(self, length: int) -> None:
        """Count the length of an archive in the source.

        Raises:
            UnpackError: all of them together are longer than any but a bomb.
        """
        limit = max(MIN_LIMIT, MAX_RATIO * self._identify()[0])
        self._total += length
        if self._total > limit:
            raise UnpackError(
                f"the archives in its archive have more than {format_bytes(limit)}, as in a "
                "decompression bomb: unpack it yourself"
            )

    def unpack(self, container: str, blocks: Iterable[bytes]) -> Path:
        """Return the path of the copy of an archive, which is written unless it exists.

        Raises:
            UnpackError: it is damaged or too long.
            OSError: the copy cannot be written.
        """
        path = self.path(container)
        if path.exists():
            self.count(path.stat().st_size)
            return path
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            with name_in_errors(partial), partial.open("wb") as file:
                for block in blocks:
                    self.count(len(block))
                    file.write(block)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Remove temporary copies."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = self._folder = None

    def _identify(self) -> tuple[int, int]:
        if self._identity is None:
            if isinstance(self._source, RemotePath):
                self._identity = self._source.size_and_stamp()
            else:
                status = self._source.stat()
                self._identity = status.st_size, status.st_mtime_ns
        return self._identity


def is_compressed(head: bytes) -> bool:
    """Return whether a file begins as a compressed one does.

    Raises:
        UnpackError: it is compressed in a way that is not read here.
    """
    if head.startswith(_ZSTD):
        raise UnpackError("it is compressed with zstd, which is not read here: use zstd -d first")
    return any(mark.match(head) for mark in _OPENERS)


def decompress(file: IO[bytes], head: bytes) -> Iterator[bytes]:
    """Yield the decompressed contents of a file in blocks.

    Args:
        file: the compressed file, at its start.
        head: its first bytes.

    Raises:
        UnpackError: it is damaged or cut.
        OSError: it cannot be read.
    """
    opener = next(opener for mark, opener in _OPENERS.items() if mark.match(head))
    try:
        with opener(fileobj=file) if opener is gzip.GzipFile else opener(file) as stream:
            while block := stream.read(_BLOCK):
                yield block
    except (EOFError, zlib.error, lzma.LZMAError):
        raise UnpackError("its compressed data is cut or damaged") from None
    except OSError as error:
        if error.errno is not None or isinstance(error, StorageError):
            raise
        raise UnpackError("its compressed data is cut or damaged") from None


def decompress_member(file: IO[bytes], method: int, size: int, checksum: int) -> Iterator[bytes]:
    """Yield the contents of a compressed member of a zip in blocks.

    Args:
        file: its compressed data.
        method: its compression method.
        size: its declared length in bytes.
        checksum: its declared CRC-32.

    Raises:
        UnpackError: it is damaged, or longer or shorter than declared.
        OSError: it cannot be read.
    """
    decoder = MemberDecoder(method, size)
    found, left = 0, size
    while not decoder.eof and left >= 0:
        data = file.read(_BLOCK) if decoder.needs_input else b""
        try:
            block = decoder.decompress(data, _BLOCK)
        except MemberDataError as error:
            raise UnpackError(str(error)) from None
        if not data and not block:
            break
        found, left = zlib.crc32(block, found), left - len(block)
        yield block
    if left or found != checksum:
        raise UnpackError("its data does not match the zip's length and checksum")
