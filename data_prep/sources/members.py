"""Members of zips and tars, listed without trusting them."""

import struct
import tarfile
import zipfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from data_prep.format.storage import Location
from data_prep.format.tars import (
    TarError,
    Warn,
    describe_path_problem,
    describe_problem,
    open_part,
    walk_tar,
)
from data_prep.sources.files import SourceError, SourceFile, normal_path
from data_prep.sources.zip_methods import METHODS

_MEMBER = b"PK\x03\x04"
_MAX_OFFSET = 2**62


class Archive(NamedTuple):
    """A zip or an uncompressed tar: a file, or a byte range of one."""

    place: Location
    """The file."""
    container: str = ""
    """Name of the file in the source, if it is unpacked; empty if it is the source itself."""
    start: int = 0
    """First byte in the file."""
    length: int | None = None
    """Length in bytes; None: the rest of the file."""
    is_zip: bool = False
    """Whether it is a zip."""


def list_members(archive: Archive, missing_end: Warn | None = None) -> Iterator[SourceFile]:
    """Yield every member that is not a folder.

    A backslash in a name separates folders, as programs for Windows write it. For `missing_end` see
    `walk_tar`.

    Raises:
        SourceError: the zip is damaged.
        TarError: the tar is damaged.
    """
    files = _list_zip(archive) if archive.is_zip else _list_tar(archive, missing_end)
    for file in files:
        if file.path[-1:] != "/":
            yield file._replace(offset=archive.start + file.offset, container=archive.container)


def find_replaced(archive: Archive, missing_end: Warn | None = None) -> frozenset[int]:
    """Return the positions of members that a later one of the same path replaces.

    Unpacking an archive leaves the last of them; several are there where files were added to a tar
    again. Only the headers are read, and 8 bytes held for each; a damaged archive as far as it can
    be, since listing it raises the error.
    """
    hashes = array("q")
    with suppress(SourceError, TarError):
        hashes.extend(hash(normal_path(file.path)) for file in list_members(archive, missing_end))
    ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
    repeated = frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    replaced: set[int] = set()
    last: dict[str, int] = {}
    with suppress(SourceError, TarError):
        for position, file in enumerate(list_members(archive, missing_end) if repeated else ()):
            path = normal_path(file.path)
            if hash(path) in repeated:
                if path in last:
                    replaced.add(last[path])
                last[path] = position
    return frozenset(replaced)


def _list_zip(archive: Archive) -> Iterator[SourceFile]:
    try:
        with archive.place.open("rb") as file:
            length = archive.length
            part = file if length is None else open_part(file, archive.start, length)
            with zipfile.ZipFile(part) as members:
                found = members.infolist()
            part.seek(0)
            begins_with_member = part.read(len(_MEMBER)) == _MEMBER
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise SourceError(f"{archive.place} is a damaged zip ({error}). Fetch it again.") from None
    if begins_with_member and all(member.header_offset for member in found):
        # The table found near the end is that of a zip inside of this one.
        raise SourceError(
            f"{archive.place} is a cut or damaged zip: its first member is not in the table of its "
            "members. Fetch it again."
        )
    for member in found:
        name = _plain_name(member.filename)
        yield SourceFile(
            path=name,
            size=member.file_size,
            stamp=member.CRC,
            offset=member.header_offset,
            stored=member.compress_size,
            method=member.compress_type,
            problem=_describe_zip_problem(member, name),
        )


def _list_tar(archive: Archive, missing_end: Warn | None) -> Iterator[SourceFile]:
    for member in walk_tar(
        archive.place, start=archive.start, length=archive.length, missing_end=missing_end
    ):
        if member.isdir():
            continue
        file = SourceFile(
            path=_plain_name(member.name),
            size=member.size,
            stamp=int(member.mtime),
            offset=member.offset_data,
            problem=_describe_tar_problem(member),
        )
        end = file.offset + file.size
        if archive.length is not None and end > archive.length and not file.problem:
            file = file._replace(problem="the tar it is in is cut before its end")
        yield file


def _plain_name(name: str) -> str:
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _describe_tar_problem(member: tarfile.TarInfo) -> str:
    return describe_problem(member) or describe_path_problem(_plain_name(member.name)) or ""


def _describe_zip_problem(member: zipfile.ZipInfo, name: str) -> str:
    if member.flag_bits & 0x1:
        return "it is encrypted"
    if (member.external_attr >> 28) == 0xA:
        return "it is a link"
    if member.compress_type not in METHODS:
        return f"its compression method {member.compress_type} is not read here"
    if not 0 <= member.header_offset < _MAX_OFFSET:
        return "its place in the zip is impossible"
    # Deflate adds 5 bytes to a block that it cannot shrink, LZMA 1 in 64 KiB, bzip2 a hundredth and
    # 600 bytes; each needs one for anything at all.
    added = {zipfile.ZIP_STORED: 0, zipfile.ZIP_DEFLATED: member.file_size // 1000 + 64}
    most = member.file_size + added.get(member.compress_type, member.file_size // 50 + 1024)
    least = min(1, member.file_size) if member.compress_type else member.file_size
    if not least <= member.compress_size <= most:
        return "its lengths in the zip contradict each other"
    return describe_path_problem(name) or ""
