"""Local and remote files: the part of `pathlib.Path` that shards need, for URLs through fsspec.

A location is a `Path` or a `RemotePath`, and code that reads shards treats both alike. Only plain
object stores and web servers are supported: nothing that runs a command or chains file systems.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

if TYPE_CHECKING:
    import fsspec

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}
"""Supported protocols, each with the package it needs."""

ATTEMPTS = 8
"""Attempts at a request before it counts as failed."""

FIRST_DELAY = 0.1
"""Seconds before the second attempt; doubled before each further one, with jitter."""

LONGEST_DELAY = 20.0
"""Longest delay between two attempts, in seconds."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # Python keeps other bytes in the rest
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "aiohttp": "http"}
_BLOCK = 2**22
_READ_AHEAD = 2**22
_MAX_REMOVED_PER_REQUEST = 1000
_NOT_RETRIED = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
_Result = TypeVar("_Result")


class StorageError(ValueError):
    """A URL cannot be used, or a store does not answer."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL, with the methods of `pathlib.Path` that shards need.

    It holds no connection, so it can be sent to other processes and survives a fork. Failed
    requests are retried with exponential back-off and jitter. Build it with `locate`.

    Raises:
        FileNotFoundError: the URL does not exist.
        StorageError: the store does not answer, or the package for its protocol is missing.
    """

    url: str
    attempts: int = ATTEMPTS

    def __truediv__(self, name: str) -> "RemotePath":
        return replace(self, url=f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """Name without its last suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> "RemotePath":
        """Folder of this file."""
        return replace(self, url=self.url.rstrip("/").rsplit("/", 1)[0])

    def read_bytes(self) -> bytes:
        """Return the whole file."""
        return cast(bytes, self._try(lambda system: system.cat_file(self.url)))

    def read_range(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, or fewer at the end of the file."""

        def read(system: Any) -> bytes:
            data: bytes = system.cat_file(self.url, start=offset, end=offset + size)
            return data

        data = self._try(read)
        if len(data) > size:  # a web server may answer with the whole file
            raise StorageError(
                f"{self} cannot be read by byte range: its server sends whole files only. Read "
                "whole shards (in training: data.remote=shards), or use a server that supports "
                "range requests."
            )
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading, in blocks; seeking needs a server with range requests."""
        assert mode == "rb", mode
        return cast(BinaryIO, self._try(lambda system: system.open(self.url, "rb", _BLOCK)))

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of the file from `start`, one block at a time."""
        if not self.supports_ranges():
            yield from self._stream(start)
            return
        size = self.stat().st_size
        for offset in range(start, size, _BLOCK):
            yield self.read_range(offset, min(_BLOCK, size - offset))

    def supports_ranges(self) -> bool:
        """Return whether the server supports range requests; some web servers do not."""

        def probe(system: Any) -> bool:
            try:
                with system.open(self.url, "rb", _BLOCK) as file:
                    file.seek(1)
                    file.read(1)
            except ValueError:
                return False
            return True

        return not self.url.startswith("http") or self._try(probe)

    def _stream(self, start: int) -> Iterator[bytes]:
        """Yield the bytes from `start`, from one request for the whole file, retried on failure."""
        place, stream = 0, None

        def read(system: Any) -> bytes:
            nonlocal place, stream
            if stream is None:
                place, stream = 0, system.open(self.url, "rb", block_size=0)
            try:
                data: bytes = stream.read(_BLOCK)
            except BaseException:
                stream.close()
                stream = None
                raise
            return data

        had = start
        try:
            while block := self._try(read):
                new = block[max(0, had - place) :]
                place += len(block)
                had += len(new)
                if new:
                    yield new
        finally:
            if stream is not None:
                stream.close()

    def stat(self) -> SimpleNamespace:
        """Return `st_size`, the length in bytes; if the server does not say, the file is read."""
        return SimpleNamespace(st_size=self._length(self._info()))

    def content_length(self) -> int | None:
        """Return the length in bytes as the server states it, or None if it does not."""
        size = self._info().get("size")
        return None if size is None else int(size)

    def exists(self) -> bool:
        """Return whether there is a file or a folder."""
        return bool(self._try(lambda system: system.exists(self.url)))

    def is_dir(self) -> bool:
        """Return whether there is a folder, that is, a prefix of other names."""
        return bool(self._try(lambda system: system.isdir(self.url)))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yield the files directly in this folder whose names match."""
        listed = self._try(lambda system: system.ls(self.url, detail=False))
        for path in sorted(listed):
            name = str(path).rstrip("/").rsplit("/", 1)[-1]
            if fnmatchcase(name, pattern):
                yield self / name

    def walk(self) -> Iterator[tuple[str, int, int]]:
        """Yield (relative path, size in bytes, stamp) of every file below; see `size_and_stamp`."""
        listed = self._try(lambda system: system.ls(self.url, detail=True))
        for entry in sorted(listed, key=lambda entry: str(entry["name"])):
            name = str(entry["name"])
            below = name.rstrip("/").rsplit("/", 1)[-1]
            if entry["type"] == "directory":
                if below != self.name:
                    for path, size, stamp in (self / below).walk():
                        yield f"{below}/{path}", size, stamp
            elif not name.endswith("/"):  # some stores mark a folder with an empty object
                found = entry if entry.get("size") is not None else (self / below)._info()
                yield below, (self / below)._length(found), _stamp(found)

    def list_sizes(self) -> dict[str, int]:
        """Return name → length in bytes of the files and folders directly in this folder."""
        try:
            listed = self._try(lambda system: system.ls(self.url, detail=True))
        except FileNotFoundError:
            return {}
        names = {str(entry["name"]): entry.get("size") or 0 for entry in listed}
        own = f"/{self.name}/"  # some stores mark a folder with an empty object
        return {
            name.rstrip("/").rsplit("/", 1)[-1]: size
            for name, size in names.items()
            if not f"/{name}".endswith(own)
        }

    def size_and_stamp(self) -> tuple[int, int]:
        """Return the length in bytes and a stamp, a number that changes with the content."""
        info = self._info()
        return self._length(info), _stamp(info)

    def _length(self, info: dict[str, Any]) -> int:
        size = info.get("size")
        return sum(map(len, self._stream(0))) if size is None else int(size)

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._try(lambda system: system.info(self.url))
        return info

    def write_bytes(self, data: bytes) -> None:
        """Write a whole object; it appears complete or not at all."""
        self._try(lambda system: system.pipe_file(self.url, data))

    def upload(self, path: Path, sent: Callable[[int], object] = lambda _: None) -> None:
        """Upload a local file as one object, calling `sent` with the number of bytes sent."""

        def put(system: Any) -> None:
            system.put_file(str(path), self.url, callback=_byte_callback(sent))

        self._try(put)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._try(lambda system: system.rm_file(self.url))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_objects(self, names: Iterable[str]) -> None:
        """Remove objects directly in this folder, many per request if the store supports it."""
        paths = [self / name for name in names]
        if set("*?[") & set(self.url):  # a bulk removal would take such a URL for a pattern
            for path in paths:
                path.unlink(missing_ok=True)
            return
        for first in range(0, len(paths), _MAX_REMOVED_PER_REQUEST):
            urls = [path.url for path in paths[first : first + _MAX_REMOVED_PER_REQUEST]]
            with suppress(FileNotFoundError):  # gone already
                self._try(partial(_remove, urls))

    def _try(self, request: Callable[[Any], _Result]) -> _Result:
        """Make a request, retrying until it succeeds or all attempts are used."""
        for attempt in range(1, self.attempts + 1):
            try:
                return request(_file_system(self.url))
            except (*_NOT_RETRIED, StorageError):
                raise
            # Each store's library raises its own types for a broken connection.
            except Exception as error:
                if attempt == self.attempts:
                    raise StorageError(
                        f"{self} cannot be reached after {attempt} attempts "
                        f"({type(error).__name__}: {error}). Check the address, the network and "
                        "the credentials."
                    ) from error
            longest = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1))
            time.sleep(random.uniform(longest / 2, longest))
        raise ValueError(f"attempts must be at least 1, got {self.attempts}.")


Location = Path | RemotePath
"""A local file or folder, or one at a URL."""


def locate(place: str | os.PathLike[str] | RemotePath) -> Location:
    """Return the location of a path or a URL.

    Raises:
        StorageError: it is empty or no file can have that name, the URL is chained, or its protocol
            is not supported.
    """
    if isinstance(place, RemotePath):
        return place
    name = os.fspath(place)
    if not name.strip() or _NO_NAME.search(name):
        fault = "holds NUL or half a character, as no name does" if name.strip() else "is empty"
        raise StorageError(f"{name!a} {fault}. Give a path or a URL.")
    if not isinstance(place, str):
        return Path(place)
    text, match = place, _URL.fullmatch(place)
    if "::" in text and "://" in text:
        raise StorageError(f"{text!r} chains file systems with `::`, which is refused.")
    if match is None and not text.startswith("pipe:"):
        return Path(text)
    protocol = match.group(1) if match else "pipe"
    if protocol == "pipe":
        raise StorageError(
            f"{text!r} would run a command, which is refused here. For shards that only a command "
            "can fetch: `data-prep index 'pipe:COMMAND' --output FOLDER --allow-pipe`, and then "
            "train from FOLDER with data.allow_pipe=true."
        )
    if protocol not in PROTOCOLS:
        raise StorageError(
            f"{text!r}: the protocol {protocol!r} is refused. Give a path, or a URL of "
            f"{', '.join(PROTOCOLS)}."
        )
    if not text.partition("://")[2].strip("/"):
        raise StorageError(f"{text!r} names no host or bucket. Give a whole URL.")
    return RemotePath(text.rstrip("/"))


def _byte_callback(sent: Callable[[int], object]) -> "fsspec.Callback":
    """Return an fsspec callback that reports bytes sent; a retried request reports them again."""
    import fsspec  # noqa: PLC0415 - with asyncio, which takes a while and local files do not need

    class Sent(fsspec.Callback):  # type: ignore[misc]  # fsspec has no types
        def relative_update(self, inc: int = 1) -> None:
            sent(inc)

    return Sent()


def _remove(urls: list[str], system: Any) -> None:
    system.rm(urls)


def _stamp(info: dict[str, Any]) -> int:
    """Return a number from whichever content mark the store has for a file."""
    marks = [str(info[name]) for name in ("ETag", "etag", "md5Hash", "mtime") if info.get(name)]
    marks = marks or [str(info.get("LastModified") or info.get("created") or "")]
    return int.from_bytes(hashlib.blake2b(marks[0].encode(), digest_size=7).digest(), "big")


def _file_system(url: str) -> Any:
    """Return the file system of a URL; fsspec caches one per process and thread."""
    import fsspec  # noqa: PLC0415 - with asyncio, which takes a while and local files do not need

    protocol = url.partition("://")[0]
    package = PROTOCOLS[protocol]
    try:
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError:
        extra = _EXTRAS[package]
        raise StorageError(
            f"{url} needs the package {package}: pip install 'simmim[{extra}]'."
        ) from None


class ByteReader:
    """Random reads from one file; remote files are read ahead while reads are sequential.

    Raises:
        OSError: the file is missing or cannot be read.
        StorageError: the store does not answer, or sends whole files only.
    """

    def __init__(self, path: Location) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY) if isinstance(path, Path) else -1
        self._size = -1
        self._held, self._held_from = b"", 0

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, or fewer at the end of the file."""
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
            # A read that begins just behind the last one is part of a sequence.
            follows = self._held and self._held_from <= offset <= held_to + _READ_AHEAD // 4
            length = max(size, _READ_AHEAD) if follows else size
            self._held = path.read_range(offset, min(length, self._size - offset)) if size else b""
            self._held_from = offset
        start = offset - self._held_from
        return self._held[start : start + size]
