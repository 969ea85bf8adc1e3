"""Listing of the images below a folder, with a count of what is skipped."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from data_prep.format import manifest
from simmim.data.order.source import DataError

IMAGE_SUFFIXES = frozenset(suffix.encode() for suffix in manifest.IMAGE_SUFFIXES)
"""File name suffixes of images, in lower case, as bytes: those of `data-prep`."""

MAC_ARCHIVE = b"__MACOSX"
"""Folder of macOS metadata in zip archives."""

PROGRESS_DELAY = 2.0
"""Seconds before the progress bar appears."""

NAMED = 5
"""Most folders, or kinds of files, listed in a message."""


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """Images found below a folder."""

    paths: list[bytes]
    """Paths of all images relative to the folder, with forward slashes, sorted."""
    skipped: Counter[str]
    """Number of skipped entries of each kind."""
    without_images: tuple[str, ...]
    """Names of its direct subfolders without images at any depth, sorted."""

    @property
    def remarks(self) -> str:
        """Summary of what was skipped, for the user; empty if nothing was."""
        parts = []
        if self.skipped:
            most_first = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{kind} ({count:,})" for kind, count in most_first]
            parts.append(f"skipped: {_listed(kinds)}")
        if self.without_images:
            names = _listed(self.without_images)
            parts.append(f"folders without images ({len(self.without_images):,}): {names}")
        return "; ".join(parts)


def list_images(folder: Path) -> FolderListing:
    """List every image below a folder, at any depth.

    Links are followed, except circular ones. Files are recognised by suffix and not opened; hidden
    files and folders, and files with other suffixes, are skipped and counted.

    Raises:
        DataError: a folder cannot be read.
    """
    paths: list[bytes] = []
    classes: set[bytes] = set()
    skipped: Counter[str] = Counter()
    waiting = [(b"", frozenset[tuple[int, int]]())]
    with _progress(folder) as bar:
        while waiting:
            prefix, above = waiting.pop()
            identity, entries = _scan(folder, prefix)
            if identity in above:
                skipped["circular links"] += 1
                continue
            for entry in entries:
                match _kind(entry):
                    case EntryKind.IMAGE:
                        paths.append(prefix + entry.name)
                    case EntryKind.FOLDER:
                        waiting.append((prefix + entry.name + b"/", above | {identity}))
                        if not prefix:
                            classes.add(entry.name)
                    case str(other):
                        skipped[other] += 1
            bar.update(len(paths) - bar.n)
    paths.sort()
    filled = {first for first, slash, _ in (path.partition(b"/") for path in paths) if slash}
    empty = sorted(display_name(name) for name in classes - filled)
    return FolderListing(paths=paths, skipped=skipped, without_images=tuple(empty))


def display_name(name: bytes) -> str:
    """Return a file name as text; bytes that are not UTF-8 are escaped."""
    return name.decode("utf-8", "backslashreplace")


def _progress(folder: Path) -> "tqdm[NoReturn]":
    first = int(os.environ.get("RANK", "0")) == 0
    return tqdm(
        desc=f"listing {folder}",
        unit=" images",
        leave=False,
        delay=PROGRESS_DELAY,
        disable=None if first else True,
    )


def _scan(folder: Path, prefix: bytes) -> tuple[tuple[int, int], list[os.DirEntry[bytes]]]:
    """Return the (device, inode) of a folder, and its entries."""
    path = os.path.join(os.fsencode(folder), prefix)  # noqa: PTH118 - names need not be text
    try:
        status = os.stat(path)  # noqa: PTH116
        with os.scandir(path) as entries:
            return (status.st_dev, status.st_ino), list(entries)
    except OSError as error:
        raise DataError(
            f"folder {display_name(path)} cannot be listed ({error.strerror}): make it readable, or"
            " remove it."
        ) from None


class EntryKind(Enum):
    """Kind of an entry that is used."""

    IMAGE = auto()
    FOLDER = auto()


def _kind(entry: os.DirEntry[bytes]) -> EntryKind | str:
    """Return the kind of an entry, or the name of its kind if it is skipped.

    Only links are looked up in the file system, except those with an image suffix: a lookup for
    each of a million files on a network disk takes minutes.
    """
    if entry.name.startswith(b".") or entry.name == MAC_ARCHIVE:
        return "hidden"
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - names need not be text
    if suffix in IMAGE_SUFFIXES and (entry.is_symlink() or entry.is_file()):
        return EntryKind.IMAGE
    try:
        if entry.is_dir():
            return EntryKind.FOLDER
        if entry.is_symlink():
            entry.stat()
    except OSError:
        return "broken links"
    if suffix in IMAGE_SUFFIXES:
        return "pipes, sockets or devices"
    return display_name(suffix) if suffix else "no suffix"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
