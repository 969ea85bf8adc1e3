"""Zips and tars as sources, with the archives in them; members are read at their offsets."""

import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.format.kinds import Examples, archive_stem, is_hidden
from data_prep.format.storage import ByteReader, Location
from data_prep.format.tars import TarError, Warn, open_part
from data_prep.sources.files import SourceError, SourceFile, UnreadableFileError
from data_prep.sources.members import Archive, find_replaced, list_members
from data_prep.sources.unpacking import (
    HEAD_BYTES,
    UnpackedFiles,
    UnpackError,
    decompress,
    decompress_member,
    is_compressed,
)
from data_prep.sources.zip_methods import MemberDataError, MemberDecoder

_EXTRA_BYTES = 64
_HEADER_BYTES = 30
_HEADER = b"PK\x03\x04"
_EMPTY_ZIP = b"PK\x05\x06"
_MAX_DEPTH = 3
_MAX_OPEN = 32
REPLACED = "replaced by a later member of the same path"
"""Kind of members that unpacking would overwrite."""
_WHOLE = "."
"""Container of the members of a tar that is compressed as a whole."""


class ArchiveSource:
    """A zip or tar, also compressed, and the archives in it.

    An archive in it counts as a folder: files directly in it are labelled with its name without
    suffix, others with their folder. Archives that allow no random access are unpacked once.

    Args:
        path: the archive.
        is_zip: whether it is a zip rather than a tar.
        scratch: folder of unpacked archives, shared by all processes; None: a temporary one.
        missing_end: see `walk_tar`.
    """

    is_explicit = False
    classes: tuple[str, ...] | None = None

    def __init__(
        self,
        path: Location,
        *,
        is_zip: bool,
        scratch: Path | None = None,
        missing_end: Warn | None = None,
    ) -> None:
        self.path = path
        self._missing_end = missing_end
        self.skipped: Counter[str] = Counter()
        self.examples = Examples()
        self._is_zip = is_zip
        self._unpacked = UnpackedFiles(path, scratch)
        self._readers: dict[str, ByteReader] = {}
        self._replaced: dict[Archive, frozenset[int]] = {}

    def files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder; those of archives in it in their place.

        Raises:
            SourceError, TarError: it is damaged; damaged archives in it have a problem instead.
            OSError: an archive in it cannot be unpacked for lack of space.
        """
        self._unpacked.forget()
        self.skipped.clear()
        archive = Archive(self.path, is_zip=self._is_zip)
        try:
            if not self._is_zip:
                archive = self._decompress(archive, _WHOLE)
            yield from self._walk(archive, 0)
        except UnpackError as error:
            raise TarError(f"{self.path} cannot be used: {error}. Fetch it again.") from None
        except TarError as error:  # of an unpacked copy, which the user does not know
            raise TarError(str(error).replace(str(archive.place), str(self.path))) from None

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder; archives have their sizes too."""
        return self.files()

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a member, never more than its declared size.

        Raises:
            UnreadableFileError: its data is truncated, damaged or longer than declared.
        """
        reader = self._reader(file.container)
        if file.stored:
            return _read_zipped(reader, file)
        data = reader.read(file.offset, file.size)
        if len(data) != file.size:
            raise UnreadableFileError("the tar is truncated")
        return data

    def close(self) -> None:
        """Close the files and remove temporary ones."""
        for reader in self._readers.values():
            reader.close()
        self._readers = {}
        self._unpacked.close()

    def _reader(self, container: str) -> ByteReader:
        if container not in self._readers:
            while len(self._readers) >= _MAX_OPEN:
                self._readers.pop(next(iter(self._readers))).close()
            place = self._unpacked.path(container) if container else self.path
            if container and not place.exists():
                raise UnreadableFileError("the unpacked copy of its archive is missing")
            self._readers[container] = ByteReader(place)
        return self._readers[container]

    def _walk(self, archive: Archive, depth: int) -> Iterator[SourceFile]:
        warn = self._end_warning(archive)
        if archive not in self._replaced:
            self._replaced[archive] = find_replaced(archive, warn)
        replaced = self._replaced[archive]
        for position, file in enumerate(list_members(archive, warn)):
            if position in replaced:
                self.skipped[REPLACED] += 1
                self.examples.add(REPLACED, file.path)
                continue
            stem = archive_stem(file.path)
            if not stem or file.problem or is_hidden(file.path):
                yield file
                continue
            if depth == _MAX_DEPTH:
                yield file._replace(problem=f"it is in more than {_MAX_DEPTH} other archives")
                continue
            yield from self._inner(file, archive, stem, depth)

    def _end_warning(self, archive: Archive) -> Warn | None:
        warn = self._missing_end
        if warn is None:
            return None
        name = f"{self.path} ({archive.container})" if archive.container else str(self.path)
        return lambda text: warn(text.replace(str(archive.place), name))

    def _inner(
        self, outer: SourceFile, archive: Archive, stem: str, depth: int
    ) -> Iterator[SourceFile]:
        """Yield the members of an archive in the archive; itself if it is damaged."""
        try:
            inner = self._open(outer, archive)
            for file in self._walk(inner, depth + 1):
                label = stem if file.label is None and "/" not in file.path else file.label
                yield file._replace(path=f"{outer.path}/{file.path}", label=label)
        except UnpackError as error:
            yield outer._replace(problem=str(error))
        except (SourceError, TarError):
            plain = outer.path.lower().endswith(".tar")
            kind = "cut, damaged or compressed tar" if plain else "cut or damaged archive"
            yield outer._replace(problem=f"it is a {kind}")

    def _open(self, file: SourceFile, archive: Archive) -> Archive:
        """Return an archive in the archive as a range of a file, unpacked if need be."""
        name = f"{archive.container}/{file.path}" if archive.container else file.path
        if not file.stored:
            inner = Archive(archive.place, archive.container, file.offset, file.size)
        else:
            start = file.offset + _data_offset(self._reader(archive.container), file)
            inner = Archive(archive.place, archive.container, start, file.stored)
        if file.method != zipfile.ZIP_STORED:
            with inner.place.open("rb") as stream:
                part = open_part(stream, inner.start, file.stored)
                blocks = decompress_member(part, file.method, file.size, file.stamp)
                copy = self._unpacked.unpack(name, blocks)
            inner = Archive(copy, name, 0, file.size)
        else:
            self._unpacked.count(file.size)
        inner = self._decompress(inner, f"{name}/{_WHOLE}")
        head = self._head(inner)
        return inner._replace(is_zip=head.startswith((_HEADER, _EMPTY_ZIP)))

    def _decompress(self, archive: Archive, name: str) -> Archive:
        """Return a compressed archive unpacked, any other as it is."""
        head = self._head(archive)
        if not is_compressed(head):
            return archive
        with archive.place.open("rb") as stream:
            length = archive.length
            part = stream if length is None else open_part(stream, archive.start, length)
            copy = self._unpacked.unpack(name, decompress(part, head))
        return Archive(copy, name, 0, copy.stat().st_size)

    def _head(self, archive: Archive) -> bytes:
        return self._reader(archive.container).read(archive.start, HEAD_BYTES)


def _data_offset(reader: ByteReader, file: SourceFile) -> int:
    """Return the offset of a zipped member's data behind its header.

    Raises:
        UnpackError: the header is damaged.
    """
    block = reader.read(file.offset, _HEADER_BYTES)
    if len(block) < _HEADER_BYTES or not block.startswith(_HEADER):
        raise UnpackError("its header in the zip is damaged")
    name, extra = struct.unpack_from("<HH", block, _HEADER_BYTES - 4)
    return _HEADER_BYTES + int(name) + int(extra)


def _read_zipped(reader: ByteReader, file: SourceFile) -> bytes:
    # Name and extra field have any length, but nearly always at most this.
    length = _HEADER_BYTES + len(file.path) + _EXTRA_BYTES + file.stored
    block = reader.read(file.offset, length)
    if len(block) < _HEADER_BYTES or not block.startswith(_HEADER):
        raise UnreadableFileError("its header in the zip is damaged")
    start = _HEADER_BYTES + sum(struct.unpack_from("<HH", block, _HEADER_BYTES - 4))
    data = block[start : start + file.stored]
    if len(data) < file.stored:
        data = reader.read(file.offset + start, file.stored)
    if file.method != zipfile.ZIP_STORED:
        try:
            data = MemberDecoder(file.method, file.size).decompress(data, file.size + 1)
        except MemberDataError as error:
            raise UnreadableFileError(str(error)) from None
    if len(data) != file.size or zlib.crc32(data) != file.stamp:
        raise UnreadableFileError("its data does not match the zip's length and checksum")
    return data
