"""Kinds of files that are met among images and not taken, for counts that users read."""

import re
from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.format.manifest import IMAGE_SUFFIXES
from data_prep.format.text import count_noun, printable

HIDDEN = "hidden"
"""Kind of hidden files, and of the metadata that macOS adds to archives."""
NO_SUFFIX = "no suffix"
NUMBERED = "numbered suffix"
WITH_QUERY = " with a query"
"""End of the kinds of image names with a query behind the suffix."""
SECOND_DOT = " after a second dot"
"""End of the kinds of images in tars whose names have more dots than that of the extension."""
UNCLEAR = frozenset({NO_SUFFIX, NUMBERED})
"""Kinds of files that may be images for all that their names say."""
_MAC_ARCHIVE = "__MACOSX"
_MAX_KINDS = 50
_MANY = "other kinds"
_NAMED = 20
_EXAMPLES = 3
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_+-]{0,11}|\.7z|\.3gp|\.3g2")
_COMPRESSED = re.compile(r"\.tar(\.[a-z0-9]{1,4})\Z")
_ARCHIVE = re.compile(r"\.(?:zip|t(?:ar|gz|bz2?|xz)|tar\.(?:gz|bz2?|xz|lzma))\Z", re.IGNORECASE)
_QUERY = re.compile(r"(\.[a-z0-9]{1,5})[?#&:@!].*\Z", re.DOTALL)


def suffix_of(path: str) -> str:
    """Return the suffix of a file name in lower case with its dot, or an empty string.

    The name of a hidden file is not a suffix.
    """
    name = path[path.rfind("/") + 1 :]  # a PurePosixPath would take longer than all the rest
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def is_archive_name(path: str) -> bool:
    """Return whether a file is called like an archive whose members are read."""
    return _ARCHIVE.search(path) is not None


def archive_stem(path: str) -> str:
    """Return the name of an archive without its suffix; empty for other files."""
    suffix = _ARCHIVE.search(path)
    return path[path.rfind("/") + 1 : suffix.start()] if suffix else ""


def is_hidden(path: str) -> bool:
    """Return whether a file or a folder on its path is hidden or metadata of macOS."""
    if _MAC_ARCHIVE not in path and "/." not in path and path[:1] != ".":
        return False  # nearly always, and much faster than splitting the path
    parts = path.split("/")
    return _MAC_ARCHIVE in parts or any(
        part[:1] == "." and part not in (".", "..") for part in parts
    )


def kind_of(path: str) -> str:
    """Return the kind of a file by its name: its suffix, or what stands in place of one.

    There are few kinds, whatever the names: `.heic`, `.tar.gz`, `.jpg with a query`, `hidden`,
    `numbered suffix` (as of DICOM series), `no suffix`.
    """
    if is_hidden(path):
        return HIDDEN
    name = path[path.rfind("/") + 1 :].lower()
    compressed = _COMPRESSED.search(name)
    if compressed and compressed.start():
        return compressed.group()
    suffix = suffix_of(path)
    if _SUFFIX.fullmatch(suffix):
        return suffix
    query = _QUERY.search(name)
    if query and query.group(1) in IMAGE_SUFFIXES:
        return f"{query.group(1)}{WITH_QUERY}"  # as a downloader names it: a.jpg?width=100
    if suffix[1:].isdecimal():
        return NUMBERED
    return NO_SUFFIX


@dataclass(frozen=True)
class Examples:
    """The first paths of each kind, in the order of paths, whatever the order they are met in."""

    paths: dict[str, list[str]] = field(default_factory=dict)
    """Kind → at most 3 paths."""

    def add(self, kind: str, path: str) -> None:
        """Keep a path if it is one of the first of its kind."""
        kept = self.paths.setdefault(kind, [])
        if path not in kept:
            insort(kept, path)
            del kept[_EXAMPLES:]

    def update(self, other: "Examples") -> None:
        """Keep the first paths of another source too."""
        for kind, paths in other.paths.items():
            for path in paths:
                self.add(kind, path)


def count_kind(counts: Counter[str], kind: str) -> str:
    """Add to the count of a kind, and return it; beyond 50 kinds, all others are one."""
    kind = kind if kind in counts or len(counts) < _MAX_KINDS else _MANY
    counts[kind] += 1
    return kind


def describe_kinds(counts: Mapping[str, int], most: int = _NAMED) -> str:
    """Return counts as text, the largest first: `.heic (12), no suffix (3)`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{kind} ({count:,})" for kind, count in ordered[:most]]
    if len(ordered) > most:
        rest = sum(count for _, count in ordered[most:])
        shown.append(f"{count_noun(len(ordered) - most, 'more kind')} ({rest:,})")
    return ", ".join(shown)


def describe_examples(
    counts: Mapping[str, int], examples: Mapping[str, Sequence[str]], most: int = _NAMED
) -> list[str]:
    """Return one line per kind that has examples: `.heic: a.heic, b.heic, ...`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [
        f"{kind}: {', '.join(map(printable, examples[kind]))}"
        + (", ..." if count > len(examples[kind]) else "")
        for kind, count in ordered
        if examples.get(kind)
    ]
