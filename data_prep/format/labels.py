"""Labels in `cls` members, and classes of folders: one rule for all that read them."""

import posixpath
import re
from collections.abc import Iterable

from data_prep.format.text import printable

MAX_CLASSES = 1_000_000
"""Upper bound on the number of classes."""

MAX_LABEL_BYTES = 32
"""Longest `cls` member, in bytes."""

SPLIT_NAMES = frozenset({"test", "train", "training", "val", "valid", "validation"})
"""Names of folders that are splits of a data set rather than classes, in lower case."""

_DIGITS = re.compile("[0-9]+")
_NAMED = 3


class LabelError(ValueError):
    """A `cls` member holds no label; the message is a clause."""


def parse_label(data: bytes) -> int:
    """Return the label in a `cls` member: decimal digits, with blanks around them allowed.

    `007` is 7, as everywhere in WebDataset. Signs, points, names and nothing at all are refused.

    Args:
        data: content of the member, at least its first `MAX_LABEL_BYTES` + 1 bytes.

    Raises:
        LabelError: it is not an integer from 0 to `MAX_CLASSES` - 1.
    """
    text = data.decode("ascii", "replace").strip()
    if len(data) <= MAX_LABEL_BYTES and _DIGITS.fullmatch(text) and int(text) < MAX_CLASSES:
        return int(text)
    raise LabelError(
        f"its label (cls) must be an integer from 0 to {MAX_CLASSES - 1:,}, got {text[:40]!r}"
    )


def folder_class(folder: str) -> str | None:
    """Return the class of the images in a folder: its name; None at the top of a source.

    Args:
        folder: path of the folder in the source, which may be written as `a//` or `a/.`.
    """
    name = folder.rpartition("/")[2]
    while name in ("", ".") and folder:
        folder = folder.rpartition("/")[0]
        name = folder.rpartition("/")[2]
    return name if name not in ("", ".", "..") else None


def find_doubtful_classes(folders: Iterable[str]) -> dict[str, str]:
    """Return the classes of which the folders may mean something else.

    Folders of one name are one class, wherever they are: right for `train/cat` and `val/cat`, wrong
    for `cat/left` and `dog/left`. A folder in the folder of a class is a class of its own.

    Args:
        folders: paths of the folders that hold images.

    Returns:
        Class → where its folders are, as a clause.
    """
    plain = {posixpath.normpath(folder) for folder in folders}
    places: dict[str, list[str]] = {}
    for folder in sorted(plain):
        name = folder_class(folder)
        if name is not None:
            places.setdefault(name, []).append(folder)
    doubts = {}
    for name, found in places.items():
        outer = posixpath.dirname(found[0])
        if len(found) > 1:
            more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
            named = printable(", ".join(found[:_NAMED]))
            doubts[name] = f"{name!r} is {len(found):,} folders ({named}{more})"
        elif outer and outer in plain:
            doubts[name] = f"{name!r} is in the folder of another class ({printable(found[0])})"
    return doubts


def describe_doubts(doubts: Iterable[str]) -> str:
    """Return the first values of `find_doubtful_classes` as a clause; empty if there are none."""
    named = list(doubts)
    more = f"; and {len(named) - _NAMED:,} more" if len(named) > _NAMED else ""
    return "; ".join(named[:_NAMED]) + more
