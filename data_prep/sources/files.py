"""Files of a source, and the selection of files to use."""

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from data_prep.bounds import Count, check_bounds
from data_prep.format.kinds import HIDDEN, is_archive_name, is_hidden, kind_of, suffix_of
from data_prep.format.manifest import IMAGE_SUFFIXES


class SourceError(ValueError):
    """A source is missing, not supported, or has no images."""


class UnreadableFileError(ValueError):
    """One file of a source cannot be read; the others may be."""


def normal_path(path: str) -> str:
    """Return one form of all ways to write a path."""
    if "//" not in path and "./" not in path and path[-1:] != "/":
        return path  # nearly always, and much faster
    return os.path.normpath(path)


class SourceFile(NamedTuple):
    """One file of a source, and how to read it.

    All fields enter the fingerprint of the source: the texts of `problem` must not change either.
    """

    path: str
    """Path in the source, with forward slashes."""
    size: int
    """Length in bytes, as declared by the source."""
    stamp: int
    """A number that changes with the content: modification time (folder, tar) or CRC-32 (zip)."""
    offset: int = 0
    """Offset in the archive, in bytes: of the data in a tar, of the header in a zip."""
    stored: int = 0
    """Length of the compressed data in a zip."""
    method: int = 0
    """Compression method in a zip: 0 stored, 8 deflated, 12 bzip2, 14 LZMA."""
    problem: str = ""
    """Why the file must not be used, or empty."""
    container: str = ""
    """Archive that holds it, if the source has several."""
    label: str | None = None
    """Class name from a list or shard; None: the class is the name of its folder."""
    split: str = ""
    """Split from a list or shard."""
    fields: str = ""
    """Other fields from a list or shard: a JSON object as text, or empty."""
    notes: str = ""
    """What of its JSON was left out or replaced, for the counts of the manifest, joined by `; `."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which files of a source to use."""

    include: tuple[str, ...] = ()
    """Use only paths that match, of any suffix; * matches / too; repeatable."""
    exclude: tuple[str, ...] = ()
    """Skip paths that match; * matches / too; repeatable."""
    max_bytes: Count = 512 * 2**20
    """Reject image files with more bytes."""
    split_column: str = "split"
    """Column or JSON field with the split of a file."""
    only_split: str | None = None
    """Use this split only."""
    path_column: str | None = None
    """Column with the paths of a list. Default: path, file, image, ..."""
    label_column: str | None = None
    """Column with the labels of a list. Default: label, class, ..."""
    root: str | None = None
    """Folder that the paths of a list are relative to. Default: the list's."""
    allow_missing_end: bool = False
    """Only warn of tars without an end mark, which may have been cut."""

    def __post_init__(self) -> None:
        check_bounds(self, "--")

    def wants(self, file: SourceFile, *, explicit: bool = False) -> bool:
        """Return whether to use a file; in a pattern, `*` also matches slashes.

        Args:
            file: a file of a source.
            explicit: whether a list or shard names it, so that its suffix does not matter.
        """
        return not self.why_not(file, explicit=explicit)

    def why_not(self, file: SourceFile, *, explicit: bool = False) -> str:
        """Return why a file is not used, as a kind to count; empty if it is used."""
        path = file.path
        if self.only_split is not None and file.split != self.only_split:
            return "not of --only-split"
        if not explicit and is_hidden(path):
            return HIDDEN
        if any(fnmatchcase(path, pattern) for pattern in self.exclude):
            return "matches --exclude"
        if self.include:
            wanted = any(fnmatchcase(path, pattern) for pattern in self.include)
            return "" if wanted else "does not match --include"
        suffix = suffix_of(path)
        if explicit or suffix in IMAGE_SUFFIXES or (file.problem and is_archive_name(path)):
            return ""
        return kind_of(path)
