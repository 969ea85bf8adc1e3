"""Members of uncompressed tars that others wrote, walked without trusting them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from data_prep.storage import Location


class TarError(ValueError):
    """A tar is compressed, cut or damaged."""


def walk_tar(path: Location) -> Iterator[tarfile.TarInfo]:
    """Yield every member of an uncompressed tar in order, holding none of them.

    Raises:
        TarError: the file is no tar, is compressed, is cut, or loops back on itself.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            offset = -1
            for member in tar:
                # A negative size makes tarfile read the same header for ever.
                if member.size < 0 or member.offset <= offset:
                    raise TarError(f"{path} is damaged: member {member.name!r} has no right size.")
                offset = member.offset
                yield member
                tar.members.clear()  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise TarError(_describe(path, error)) from None


def is_tar(path: Location) -> bool:
    """Tell whether a file is an uncompressed tar."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:"):
            return True
    except tarfile.TarError:
        return False


def describe_problem(member: tarfile.TarInfo) -> str | None:
    """Return why a member must not be used, or None for a plain file with a safe path."""
    if member.issym() or member.islnk():
        return "it is a link"
    if member.issparse():
        return "it is a sparse file"
    if not member.isreg():
        return "it is not a regular file"
    return describe_path_problem(member.name)


def describe_path_problem(name: str) -> str | None:
    """Return why the path of a member of an archive is unsafe, or None."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "its path leads out of the archive"
    return None


def _describe(path: Location, error: tarfile.TarError) -> str:
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
    return f"{path} is cut, damaged or not a tar ({error}). Fetch or write it again."
