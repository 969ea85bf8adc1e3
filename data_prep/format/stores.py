"""Object stores and web servers through fsspec: their settings, errors and byte ranges."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from data_prep.format.text import count_noun

if TYPE_CHECKING:
    import fsspec

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}
"""Supported protocols, each with the package it needs."""

TIMEOUT = 30.0
"""Seconds without a byte, or until a connection, after which an attempt fails."""

_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "aiohttp": "http"}
_NOT_RETRIED = (FileNotFoundError, IsADirectoryError, NotImplementedError)
_MISSING_STATUS = (404, 410)
_REFUSED_STATUS = (401, 403, 407, 451)


class StorageError(ValueError):
    """A URL cannot be used, or a store does not answer."""


class AccessError(StorageError):
    """A store refuses a request: another attempt would be refused as well."""


class WholeFilesError(StorageError):
    """A web server does not support range requests."""


@contextmanager
def named_errors(url: str, attempts: int) -> Iterator[None]:
    """Turn the errors of a store's library into ours, after the last of so many attempts."""
    try:
        yield
    except StorageError:
        raise
    except Exception as found:  # each store's library has its own types
        error = _cause_of(found)
        reason = f"{type(error).__name__}: {str(error) or 'no answer'}"
        if isinstance(error, _NOT_RETRIED):
            raise error from None
        if is_transient(found):
            raise StorageError(
                f"{url} cannot be reached after {count_noun(attempts, 'attempt')} "
                f"({reason}). Check the address, the network and the credentials."
            ) from error
        raise AccessError(
            f"{url}: access is denied ({reason}). Check the address and the credentials, and "
            "that they may read or write there."
        ) from error


def stamp_of(info: dict[str, Any]) -> int:
    """Return a number from whichever content mark the store has for a file."""
    marks = [str(info[name]) for name in ("ETag", "etag", "md5Hash", "mtime") if info.get(name)]
    marks = marks or [str(info.get("LastModified") or info.get("created") or "")]
    return int.from_bytes(hashlib.blake2b(marks[0].encode(), digest_size=7).digest(), "big")


def is_on_web(url: str) -> bool:
    """Return whether a URL is of a web server, which may support less than an object store."""
    return url.startswith("http")


def _cause_of(error: Exception) -> Exception:
    """Return why a request failed: for web servers fsspec calls every reason a missing file."""
    cause = error.__cause__
    is_web = type(cause).__module__.startswith("aiohttp") and isinstance(error, FileNotFoundError)
    found = cause if is_web and isinstance(cause, Exception) else error
    missing = getattr(found, "status", None) in _MISSING_STATUS
    return FileNotFoundError(str(found)) if missing else found


def is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed."""
    error = _cause_of(error)
    refused = getattr(error, "status", None) in _REFUSED_STATUS
    return not (refused or isinstance(error, (*_NOT_RETRIED, PermissionError, StorageError)))


def read_range(system: Any, url: str, offset: int, size: int) -> bytes:
    """Return part of a file, or less; a web server that sends all of it is not listened to."""
    if not is_on_web(url):
        return cast(bytes, system.cat_file(url, start=offset, end=offset + size))
    with system.open(url, "rb", size=offset + size, cache_type="none") as file:
        file.seek(offset)
        try:
            return cast(bytes, file.read(size))
        except ValueError:
            raise WholeFilesError(
                f"{url} cannot be read by byte range: its server sends whole files only. Read "
                "whole shards (in training: data.remote=shards), or use a server that supports "
                "range requests."
            ) from None


def file_system(url: str) -> Any:
    """Return the file system of a URL; fsspec caches one per process and thread.

    Its library's own retries are turned off where it allows that (Google's does not), and its
    timeouts set, unless fsspec's configuration sets them.
    """
    import fsspec  # noqa: PLC0415 - with asyncio, which takes a while and local files do not need

    protocol = url.partition("://")[0]
    package = PROTOCOLS[protocol]
    try:
        system = fsspec.filesystem(protocol, use_listings_cache=False)
        if package == "s3fs":
            system.retries = 1
            limits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
            system.config_kwargs = {
                **limits,
                "retries": {"total_max_attempts": 1},
                **system.config_kwargs,
            }
        elif package != "fsspec":
            import aiohttp  # noqa: PLC0415

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            if package == "gcsfs":
                system.requests_timeout = system.requests_timeout or timeout
            else:
                system.client_kwargs.setdefault("timeout", timeout)
    except ImportError:
        extra = _EXTRAS[package]
        raise StorageError(
            f"{url} needs the package {package}: pip install 'simmim[{extra}]'."
        ) from None
    return system


def byte_callback(sent: Callable[[int], object]) -> "fsspec.Callback":
    """Return an fsspec callback that reports bytes sent; a retried request reports them again."""
    import fsspec  # noqa: PLC0415 - with asyncio, which takes a while and local files do not need

    class Sent(fsspec.Callback):  # type: ignore[misc]  # fsspec has no types
        def relative_update(self, inc: int = 1) -> None:
            sent(inc)

    return Sent()
