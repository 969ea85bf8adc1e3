"""Files of a source: how each is named and found, and which are wanted."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

from data_prep.format.manifest import IMAGE_SUFFIXES


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
    container: str = ""
    """Archive of the source that holds it, where there are several."""
    label: str | None = None
    """Class name that was given for it; None where its folder names its class."""
    split: str = ""
    """Split that was given for it."""
    fields: str = ""
    """What else was given for it: a JSON object as text, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which files of a source are wanted."""

    include: tuple[str, ...] = ()
    """Patterns of paths to take, whatever their suffix; empty takes every image suffix."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths to leave out."""
    max_bytes: int = 512 * 2**20
    """Longest file taken, in bytes."""
    split_column: str = "split"
    """Column or field that names the split of a file."""
    only_split: str | None = None
    """Split to take; None takes all."""
    root: str | None = None
    """Folder that the paths of a list are relative to; None is the folder of the list."""

    def wants(self, file: SourceFile, *, explicit: bool = False) -> bool:
        """Tell whether a file is wanted; in a pattern `*` also stands for slashes.

        Args:
            file: a file of a source.
            explicit: whether someone named it in a list, so that its suffix does not matter.
        """
        path = file.path
        if self.only_split is not None and file.split != self.only_split:
            return False
        if not explicit and _is_hidden(path):
            return False
        if any(fnmatchcase(path, pattern) for pattern in self.exclude):
            return False
        if self.include:
            return any(fnmatchcase(path, pattern) for pattern in self.include)
        if explicit:
            return True
        name = path[path.rfind("/") + 1 :]  # a PurePosixPath takes longer than all the rest
        dot = name.rfind(".")
        suffix = name[dot:].lower() if dot > 0 else ""
        return suffix in IMAGE_SUFFIXES or bool(suffix == ".tar" and file.problem)


def _is_hidden(path: str) -> bool:
    if "__MACOSX" not in path and "/." not in path and path[:1] != ".":
        return False  # nearly always, and much faster than to look at each part
    parts = PurePosixPath(path).parts
    return "__MACOSX" in parts or any(part[0] == "." and part != ".." for part in parts)
