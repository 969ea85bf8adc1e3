"""Which images lie in a folder: every one that is found, and a count of what is left out."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from data_prep.format import manifest
from simmim.data.order.errors import DataError

IMAGE_SUFFIXES = frozenset(suffix.encode() for suffix in manifest.IMAGE_SUFFIXES)
"""File name suffixes of images, in lower case, as bytes: those `data-prep` takes."""

MAC_ARCHIVE = b"__MACOSX"
"""Folder of what a Mac knows of the files in a zip."""

SECONDS_UNTOLD = 2.0
"""Seconds that listing may take before a person is shown how far it is."""

NAMED = 5
"""Folders, or kinds of files, that a message names."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder holds."""

    paths: list[bytes]
    """Of all images, relative to the folder, with forward slashes, sorted."""
    left_out: Counter[str]
    """How many of each kind of thing were left out, by what a message calls the kind."""
    without_images: tuple[str, ...]
    """Names of the folders right in it that hold no image at any depth, sorted."""

    @property
    def remarks(self) -> str:
        """What a person should know of what was left out; empty where nothing was."""
        parts = []
        if self.left_out:
            most_first = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{kind} ({count:,})" for kind, count in most_first]
            parts.append(f"left out: {_listed(kinds)}")
        if self.without_images:
            names = _listed(self.without_images)
            parts.append(f"folders without images ({len(self.without_images):,}): {names}")
        return "; ".join(parts)


def list_images(folder: Path) -> Listing:
    """Find every image below a folder, however deep.

    Links are followed, but not in circles. Files are told by their suffix and not opened; hidden
    files and folders, and files of other suffixes, are left out and counted.

    Raises:
        DataError: a folder cannot be read.
    """
    paths: list[bytes] = []
    classes: set[bytes] = set()
    left_out: Counter[str] = Counter()
    waiting = [(b"", frozenset[tuple[int, int]]())]
    with _progress(folder) as bar:
        while waiting:
            prefix, above = waiting.pop()
            identity, entries = _look_into(folder, prefix)
            if identity in above:
                left_out["links in a circle"] += 1
                continue
            for entry in entries:
                match _kind(entry):
                    case Kind.IMAGE:
                        paths.append(prefix + entry.name)
                    case Kind.FOLDER:
                        waiting.append((prefix + entry.name + b"/", above | {identity}))
                        if not prefix:
                            classes.add(entry.name)
                    case str(other):
                        left_out[other] += 1
            bar.update(len(paths) - bar.n)
    paths.sort()
    filled = {first for first, slash, _ in (path.partition(b"/") for path in paths) if slash}
    empty = sorted(shown(name) for name in classes - filled)
    return Listing(paths=paths, left_out=left_out, without_images=tuple(empty))


def shown(name: bytes) -> str:
    """Return a file's name as text; bytes that are no UTF-8 are written out."""
    return name.decode("utf-8", "backslashreplace")


def _progress(folder: Path) -> "tqdm[NoReturn]":
    first = int(os.environ.get("RANK", "0")) == 0
    return tqdm(
        desc=f"listing {folder}",
        unit=" images",
        leave=False,
        delay=SECONDS_UNTOLD,
        disable=None if first else True,
    )


def _look_into(folder: Path, prefix: bytes) -> tuple[tuple[int, int], list[os.DirEntry[bytes]]]:
    """Return what tells a folder from others, and what lies in it."""
    place = os.path.join(os.fsencode(folder), prefix)  # noqa: PTH118 - names need not be text
    try:
        status = os.stat(place)  # noqa: PTH116
        with os.scandir(place) as entries:
            return (status.st_dev, status.st_ino), list(entries)
    except OSError as error:
        raise DataError(
            f"folder {shown(place)} cannot be listed ({error.strerror}): make it readable, or take"
            " it away"
        ) from None


class Kind(Enum):
    """What is used of a folder."""

    IMAGE = auto()
    FOLDER = auto()


def _kind(entry: os.DirEntry[bytes]) -> Kind | str:
    """Return what an entry is, or what a message calls it.

    The file system is asked about links alone, and not about those that are called images: to
    ask about a million files on a network disk takes minutes.
    """
    if entry.name.startswith(b".") or entry.name == MAC_ARCHIVE:
        return "hidden"
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - names need not be text
    if suffix in IMAGE_SUFFIXES and (entry.is_symlink() or entry.is_file()):
        return Kind.IMAGE
    try:
        if entry.is_dir():
            return Kind.FOLDER
        if entry.is_symlink():
            entry.stat()
    except OSError:
        return "broken links"
    if suffix in IMAGE_SUFFIXES:
        return "pipes, sockets or devices"
    return shown(suffix) if suffix else "no suffix"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
