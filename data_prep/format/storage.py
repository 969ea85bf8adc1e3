"""Local and remote files: opening, byte ranges and retries, for URLs through fsspec.

A location is a `Path` or a `RemotePath`, and code that reads shards treats both alike. Only plain
object stores and web servers are supported: nothing that runs a command or chains file systems.
"""

import io
import os
import random
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar, cast

from data_prep.format.stores import (
    PROTOCOLS,
    AccessError,
    StorageError,
    WholeFilesError,
    byte_callback,
    file_system,
    is_on_web,
    is_transient,
    named_errors,
    read_range,
    stamp_of,
)

ATTEMPTS = 8
"""Attempts at a request before it counts as failed."""

FIRST_DELAY = 0.1
"""Seconds before the second attempt; doubled before each further one, with jitter."""

LONGEST_DELAY = 20.0
"""Longest delay between two attempts, in seconds."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # Python keeps other bytes in the rest
_BLOCK = 2**22
_READ_AHEAD = 2**22
_MAX_REMOVED_PER_REQUEST = 1000
_Result = TypeVar("_Result")


def pause_after(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt, counted from 1: doubled, with jitter."""
    longest = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1))
    return random.uniform(longest / 2, longest)


def retry(
    call: Callable[[], _Result],
    attempts: int,
    is_transient: Callable[[Exception], bool],
    announce: Callable[[Exception, int, float], object] = lambda _error, _attempt, _pause: None,
) -> _Result:
    """Return the result of `call`, called up to `attempts` times while its errors are transient.

    `announce` is told the error, the number of the attempt and the pause before the next one.
    """
    for attempt in range(1, attempts):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = pause_after(attempt)
            announce(error, attempt, pause)
        time.sleep(pause)
    return call()


def read_resumed(
    stream: Callable[[], Generator[bytes, None, None]],
    start: int,
    attempts: int,
    is_transient: Callable[[Exception], bool],
) -> Iterator[bytes]:
    """Yield the bytes from `start` of a stream that can only be read from its beginning.

    After an error it is read again and what was yielded is skipped. Raises the error of `attempts`
    failures in a row without new bytes.
    """
    had, failures = start, 0
    while True:
        place = 0
        try:
            with closing(stream()) as blocks:
                for block in blocks:
                    new = block[max(0, had - place) :]
                    place += len(block)
                    if new:
                        had, failures = had + len(new), 0
                        yield new
            return
        except Exception as error:
            failures += 1
            if failures >= attempts or not is_transient(error):
                raise
        time.sleep(pause_after(failures))


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL, with the methods of `pathlib.Path` that shards need.

    It holds no connection, so it can be sent to other processes and survives a fork. Failed
    requests are retried with exponential back-off and jitter. Build it with `locate`.

    Raises:
        FileNotFoundError: the URL does not exist.
        AccessError: the store refuses the request.
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
        return self._try(lambda system: read_range(system, self.url, offset, size))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for random reads, by range requests."""
        assert mode == "rb", mode
        reader = ByteReader(self)
        return cast(BinaryIO, RangeFile(reader.read, reader.size))

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of the file from `start`, one block at a time."""
        if not self.supports_ranges():
            yield from self._stream(start)
            return
        size, offset = self.stat().st_size, start
        while offset < size:
            block = self._try(partial(self._read_block, offset, min(_BLOCK, size - offset)))
            offset += len(block)
            yield block

    def _read_block(self, offset: int, size: int, system: Any) -> bytes:
        """Return `size` bytes, or some of them: a server may send less than was asked for."""
        data = read_range(system, self.url, offset, size)
        if not data:
            raise ConnectionError(f"no bytes from {offset:,} on, although the file is longer")
        return data

    def supports_ranges(self) -> bool:
        """Return whether the server supports range requests; some web servers do not."""
        try:
            return not is_on_web(self.url) or self.read_range(1, 1) is not None
        except WholeFilesError:
            return False

    def _stream(self, start: int) -> Iterator[bytes]:
        """Yield the bytes from `start`, from one request for the whole file, retried on failure."""

        def stream() -> Generator[bytes, None, None]:
            with file_system(self.url).open(self.url, "rb", block_size=0) as file:
                while block := file.read(_BLOCK):
                    yield block

        with named_errors(self.url, self.attempts):
            yield from read_resumed(stream, start, self.attempts, is_transient)

    def stat(self) -> SimpleNamespace:
        """Return `st_size`, the length in bytes; if the server does not say, the file is read."""
        return SimpleNamespace(st_size=self._length(self._info()))

    def content_length(self) -> int | None:
        """Return the length in bytes as the server states it, or None if it does not."""
        size = self._info().get("size")
        return None if size is None else int(size)

    def exists(self) -> bool:
        """Return whether there is a file or a folder."""
        if not is_on_web(self.url):
            return bool(self._try(lambda system: system.exists(self.url)))
        try:
            self._info()
        except (FileNotFoundError, AccessError):  # buckets refuse what they do not have
            return False
        return True

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
                yield below, (self / below)._length(found), stamp_of(found)

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
        return self._length(info), stamp_of(info)

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
            system.retries = self.attempts  # of each part
            system.put_file(str(path), self.url, callback=byte_callback(sent))

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
        with named_errors(self.url, self.attempts):
            return retry(lambda: request(file_system(self.url)), self.attempts, is_transient)


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


def _remove(urls: list[str], system: Any) -> None:
    system.rm(urls)


class RangeFile(io.RawIOBase):
    """A read-only file of `size` bytes, of which `read_at(offset, size)` returns a part."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self._read_at, self._position = read_at, 0
        self.size = size

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return `size` bytes, or fewer at the end of the file."""
        left = max(0, self.size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data = self._read_at(self._position, size)
        self._position += len(data)
        return data


class ByteReader:
    """Random reads from one file; remote files are read ahead while reads are sequential.

    Raises:
        OSError: the file is missing or cannot be read.
        StorageError: the store does not answer, or sends whole files only.
    """

    def __init__(self, path: Location) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY) if isinstance(path, Path) else -1
        self._held, self._held_from = b"", 0

    @cached_property
    def size(self) -> int:
        """Length of the file in bytes."""
        return int(self._path.stat().st_size)

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
        size = max(0, min(size, self.size - offset))
        held_to = self._held_from + len(self._held)
        if not (self._held_from <= offset and offset + size <= held_to):
            # A read that begins just behind the last one is part of a sequence.
            follows = self._held and self._held_from <= offset <= held_to + _READ_AHEAD // 4
            length = max(size, _READ_AHEAD) if follows else size
            self._held = path.read_range(offset, min(length, self.size - offset)) if size else b""
            self._held_from = offset
        start = offset - self._held_from
        return self._held[start : start + size]
