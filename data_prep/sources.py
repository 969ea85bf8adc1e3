"""Where images come from: a folder, a zip or a tar, listed once and then read by position."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_prep.tars import describe_path_problem, describe_problem, is_tar, walk_tar

_SUFFIXES = "avif bmp dib gif j2k jfif jp2 jpe jpeg jpg npy pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""File name suffixes, in lower case, that are taken to be images."""


class SourceError(ValueError):
    """A source is missing, of no known kind, or holds no images."""


class UnreadableFileError(ValueError):
    """One file of a source cannot be read; the others may be."""


class SourceFile(NamedTuple):
    """One file of a source, and how to read it."""

    path: str
    """Path inside the source, with forward slashes."""
    size: int
    """Length in bytes, as the source declares it."""
    stamp: int
    """What changes with the content: modification time (folder, tar) or CRC-32 (zip)."""
    offset: int = 0
    """Where the member lies in the archive: its data in a tar, its header in a zip."""
    stored: int = 0
    """Length of the compressed data in a zip."""
    method: int = 0
    """Compression method in a zip: 0 stored, 8 deflated."""
    problem: str = ""
    """Why the file must not be used; empty where it may be."""


class FolderSource:
    """A folder of files, its subfolders included; links are followed, but not in circles."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> Iterator[SourceFile]:
        """Yield every file below the folder, in no particular order."""
        yield from self._walk(self.path, "", frozenset({_identity(self.path)}))

    def _walk(
        self, folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]
    ) -> Iterator[SourceFile]:
        with os.scandir(folder) as entries:
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


class ZipSource:
    """A zip, whose members are read by their position so that no process need hold its listing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")

    def files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder.

        Raises:
            SourceError: the zip is damaged.
        """
        try:
            with zipfile.ZipFile(self._file) as archive:
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

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a member, never more than it declares.

        Raises:
            UnreadableFileError: its data is cut, damaged or longer than declared.
        """
        header = os.pread(self._file.fileno(), 30, file.offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UnreadableFileError("its header in the zip is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = file.offset + 30 + name_length + extra_length
        data = os.pread(self._file.fileno(), file.stored, start)
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
        self._file.close()


class TarSource:
    """An uncompressed tar, whose members are read by their position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")

    def files(self) -> Iterator[SourceFile]:
        """Yield every member that is not a folder.

        Raises:
            TarError: the tar is damaged.
        """
        for member in walk_tar(self.path):
            if not member.isdir():
                yield SourceFile(
                    path=member.name.removeprefix("./"),
                    size=member.size,
                    stamp=int(member.mtime),
                    offset=member.offset_data,
                    problem=describe_problem(member) or "",
                )

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a member.

        Raises:
            UnreadableFileError: the tar is cut before its end.
        """
        data = os.pread(self._file.fileno(), file.size, file.offset)
        if len(data) != file.size:
            raise UnreadableFileError("the tar is cut before its end")
        return data

    def close(self) -> None:
        """Close the tar."""
        self._file.close()


Source = FolderSource | ZipSource | TarSource


def open_source(path: Path) -> Source:
    """Open a folder, a zip or an uncompressed tar.

    Raises:
        SourceError: there is nothing at `path`, or it is of another kind.
        TarError: it is a compressed tar.
    """
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise SourceError(f"source {path} does not exist. Give a folder, a zip or a tar of images.")
    if not path.is_file():
        raise SourceError(f"source {path} is not a file. Give a folder, a zip or a tar of images.")
    if is_tar(path):
        return TarSource(path)
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    if ".tar" in path.name.lower() or path.suffix.lower() in (".tgz", ".txz", ".tbz2"):
        list(walk_tar(path))  # raises, and says whether it is compressed or damaged
    raise SourceError(f"source {path} is neither a folder, a zip nor a tar of images.")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which files of a source are wanted."""

    include: tuple[str, ...] = ()
    """Patterns of paths to take, whatever their suffix; empty takes every image suffix."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths to leave out."""
    max_bytes: int = 512 * 2**20
    """Longest file taken, in bytes."""

    def wants(self, path: str) -> bool:
        """Tell whether a path is wanted; in a pattern `*` also stands for slashes."""
        parts = PurePosixPath(path).parts
        if "__MACOSX" in parts or any(part[0] == "." and part != ".." for part in parts):
            return False
        if any(fnmatchcase(path, pattern) for pattern in self.exclude):
            return False
        if self.include:
            return any(fnmatchcase(path, pattern) for pattern in self.include)
        return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What was found in a source."""

    files: list[SourceFile] = field(default_factory=list)
    """Files that may be used, sorted by path."""
    rejected: list[SourceFile] = field(default_factory=list)
    """Files that were wanted but must not be used, each with its problem."""
    others: int = 0
    """Files that were not wanted."""

    @property
    def found(self) -> int:
        """Files that were wanted."""
        return len(self.files) + len(self.rejected)

    def fingerprint(self) -> str:
        """Return a digest of everything wanted: paths, sizes, dates, places in an archive."""
        digest = hashlib.sha256()
        for file in (*self.files, *self.rejected):
            digest.update("\0".join(map(str, file)).encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()


def list_source(source: Source, selection: Selection) -> Listing:
    """List the wanted files of a source.

    Raises:
        SourceError: there is none.
    """
    listing = _sort_out(source.files(), selection)
    if listing.found:
        return listing
    patterns: Sequence[str] = selection.include
    wanted = f"files that match {', '.join(patterns)}" if patterns else "images"
    if not listing.others:
        raise SourceError(f"{source.path} is empty: give a folder, a zip or a tar of images.")
    raise SourceError(
        f"{source.path} holds no {wanted}, only {listing.others} other files. "
        f"Image suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}; --include takes others."
    )


def _sort_out(files: Iterable[SourceFile], selection: Selection) -> Listing:
    taken: list[SourceFile] = []
    rejected: list[SourceFile] = []
    others = 0
    for file in files:
        if not selection.wants(file.path):
            others += 1
        elif file.problem:
            rejected.append(file)
        elif file.size == 0:
            rejected.append(file._replace(problem="it is empty"))
        elif file.size > selection.max_bytes:
            limit = f"more than --max-bytes {selection.max_bytes:,}"
            rejected.append(file._replace(problem=f"it declares {file.size:,} bytes, {limit}"))
        else:
            taken.append(file)
    return Listing(files=sorted(taken), rejected=sorted(rejected), others=others)


def _describe_zip_problem(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & 0x1:
        return "it is encrypted"
    if (member.external_attr >> 28) == 0xA:
        return "it is a link"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"its compression method {member.compress_type} is not read here"
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        return "its lengths in the zip contradict each other"
    return describe_path_problem(member.filename) or ""


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
