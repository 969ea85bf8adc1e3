"""Listing the image files below a folder."""

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from data_prep.format import manifest
from data_prep.format.kinds import (
    HIDDEN,
    Examples,
    count_kind,
    describe_kinds,
    is_hidden,
    kind_of,
    suffix_of,
)
from simmim.data.order.source import DataError
from simmim.environment import process_environment

IMAGE_SUFFIXES = frozenset(suffix.encode() for suffix in manifest.IMAGE_SUFFIXES)
"""File name suffixes of images, in lower case, as bytes: those of `data-prep`."""

PROGRESS_DELAY = 2.0
"""Seconds before the progress bar appears."""

NAMED = 5
"""Maximum number of folders listed in a message."""

VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""Errors of files and folders that were removed since their folder was listed."""


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """Images found below a folder."""

    paths: list[bytes]
    """Paths of all images relative to the folder, with forward slashes, sorted."""
    skipped: Counter[str]
    """Number of skipped entries of each kind."""
    examples: Examples
    """The first skipped files of each kind."""
    without_images: tuple[str, ...]
    """Names of its direct subfolders without images at any depth, sorted."""

    @property
    def remarks(self) -> str:
        """Summary of skipped entries, for the user; empty if there are none."""
        parts = []
        if self.skipped:
            parts.append(f"skipped: {describe_kinds(self.skipped)}")
        if self.without_images:
            names = _listed(self.without_images)
            parts.append(f"folders without images ({len(self.without_images):,}): {names}")
        return "; ".join(parts)


def list_images(folder: Path) -> FolderListing:
    """List every image below a folder, at any depth.

    Links are followed, except circular ones. Files are recognised by suffix and not opened; hidden
    files and folders, files with other suffixes, and folders that vanish meanwhile are skipped
    and counted.

    Raises:
        DataError: a folder cannot be read.
    """
    paths: list[bytes] = []
    classes: set[bytes] = set()
    skipped: Counter[str] = Counter()
    examples = Examples()
    waiting = [(b"", frozenset[tuple[int, int]]())]
    with _progress(folder) as bar:
        while waiting:
            prefix, above = waiting.pop()
            identity, entries = _scan(folder, prefix)
            if identity is None:
                skipped["vanished while listed"] += 1
                continue
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
                        kind = count_kind(skipped, other)
                        examples.add(kind, display_name(prefix + entry.name))
            bar.update(len(paths) - bar.n)
    paths.sort()
    filled = {first for first, slash, _ in (path.partition(b"/") for path in paths) if slash}
    empty = sorted(display_name(name) for name in classes - filled)
    return FolderListing(
        paths=paths, skipped=skipped, examples=examples, without_images=tuple(empty)
    )


def display_name(name: bytes) -> str:
    """Return a file name as text; bytes that are not UTF-8 are escaped."""
    return name.decode("utf-8", "backslashreplace")


def _progress(folder: Path) -> "tqdm[NoReturn]":
    return tqdm(
        desc=f"listing {folder}",
        unit=" images",
        leave=False,
        delay=PROGRESS_DELAY,
        disable=None if process_environment().is_main else True,
    )


def _scan(folder: Path, prefix: bytes) -> tuple[tuple[int, int] | None, list[os.DirEntry[bytes]]]:
    """Return the (device, inode) of a folder, None if it was removed meanwhile, and its entries."""
    path = os.path.join(os.fsencode(folder), prefix)  # noqa: PTH118 - names need not be text
    try:
        status = os.stat(path)  # noqa: PTH116
        with os.scandir(path) as entries:
            return (status.st_dev, status.st_ino), list(entries)
    except OSError as error:
        if prefix and error.errno in VANISHED:
            return None, []
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
    name = display_name(entry.name)
    if is_hidden(name):
        return HIDDEN
    suffix = suffix_of(name).encode()
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
    return kind_of(name)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
