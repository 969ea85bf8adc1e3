"""Zip and tar archives as sources; members are read at their recorded offsets."""

import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from data_prep.format.storage import ByteReader, Location
from data_prep.format.tars import TarError, describe_path_problem, describe_problem, walk_tar
from data_prep.sources.files import SourceError, SourceFile, UnreadableFileError

_MAX_OFFSET = 2**62
_EXTRA_BYTES = 64


class ZipSource:
    """A zip; members are read at their offsets, so no process needs to hold the directory."""

    is_explicit = False
    classes: tuple[str, ...] | None = None

    def __init__(self, path: Location) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._bytes = ByteReader(path)

    def files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder.

        Raises:
            SourceError: the zip is damaged.
        """
        try:
            with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise SourceError(f"{self.path} is a damaged zip ({error}). Fetch it again.") from None
        for member in members:
            if not member.is_dir():
                yield SourceFile(
                    path=member.filename,
                    size=member.file_size,
                    stamp=member.CRC,
                    offset=member.header_offset,
                    stored=member.compress_size,
                    method=member.compress_type,
                    problem=_describe_zip_problem(member),
                )

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder; the directory of a zip has their sizes too."""
        return self.files()

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a member, never more than its declared size.

        Raises:
            UnreadableFileError: its data is truncated, damaged or longer than declared.
        """
        # Name and extra field have any length, but nearly always at most this.
        block = self._bytes.read(file.offset, 30 + len(file.path) + _EXTRA_BYTES + file.stored)
        if len(block) < 30 or block[:4] != b"PK\x03\x04":
            raise UnreadableFileError("its header in the zip is damaged")
        start = 30 + sum(struct.unpack_from("<HH", block, 26))
        data = block[start : start + file.stored]
        if len(data) < file.stored:
            data = self._bytes.read(file.offset + start, file.stored)
        if file.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, file.size + 1)
            except zlib.error:
                raise UnreadableFileError("its compressed data is damaged") from None
        if len(data) != file.size or zlib.crc32(data) != file.stamp:
            raise UnreadableFileError("its data does not match the zip's length and checksum")
        return data

    def close(self) -> None:
        """Close the zip."""
        self._bytes.close()


class TarSource:
    """An uncompressed tar; members are read at their offsets.

    A member that is itself a tar is a class: its members are files labelled with its stem.
    """

    is_explicit = False
    classes: tuple[str, ...] | None = None

    def __init__(self, path: Location) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._bytes = ByteReader(path)

    def files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder.

        Raises:
            TarError: the tar is damaged.
        """
        for member in walk_tar(self.path):
            if member.isdir():
                continue
            file = _describe_member(member)
            if file.path.lower().endswith(".tar") and not file.problem:
                yield from self._inner(file)
            else:
                yield file

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder; the headers of a tar have their sizes too."""
        return self.files()

    def _inner(self, tar: SourceFile) -> Iterator[SourceFile]:
        """Yield the members of a tar inside the tar, and the inner tar itself if it is damaged."""
        label = PurePosixPath(tar.path).stem
        try:
            for member in walk_tar(self.path, start=tar.offset, length=tar.size):
                if not member.isdir():
                    file = _describe_member(member)
                    place = tar.offset + file.offset
                    if file.offset + file.size > tar.size and not file.problem:
                        file = file._replace(problem="the tar it is in is cut before its end")
                    yield file._replace(path=f"{tar.path}/{file.path}", offset=place, label=label)
        except TarError:
            yield tar._replace(problem="it is a cut, damaged or compressed tar")

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a member.

        Raises:
            UnreadableFileError: the tar is truncated.
        """
        data = self._bytes.read(file.offset, file.size)
        if len(data) != file.size:
            raise UnreadableFileError("the tar is truncated")
        return data

    def close(self) -> None:
        """Close the tar."""
        self._bytes.close()


def _describe_zip_problem(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & 0x1:
        return "it is encrypted"
    if (member.external_attr >> 28) == 0xA:
        return "it is a link"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"its compression method {member.compress_type} is not read here"
    if not 0 <= member.header_offset < _MAX_OFFSET:
        return "its place in the zip is impossible"
    # Deflate adds 5 bytes to a block that it cannot shrink.
    most = member.file_size + (member.file_size // 1000 + 64) * (member.compress_type != 0)
    least = 0 if member.compress_type else member.file_size
    if not least <= member.compress_size <= most:
        return "its lengths in the zip contradict each other"
    return describe_path_problem(member.filename) or ""


def _describe_member(member: tarfile.TarInfo) -> SourceFile:
    return SourceFile(
        path=member.name.removeprefix("./"),
        size=member.size,
        stamp=int(member.mtime),
        offset=member.offset_data,
        problem=describe_problem(member) or "",
    )
