"""Columns of lists: which one has the paths and the labels, and what a label is."""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from data_prep.format.storage import Location
from data_prep.sources.files import SourceError

_PATHS = (
    "path paths file filename file_name filepath file_path image images image_path imagepath "
    "image_file image_filename image_name img img_path img_file impath relative_path"
)
PATH_NAMES = frozenset(_PATHS.split())
"""Names of columns with paths, in lower case, with underscores for blanks and hyphens."""
_LABELS = (
    "label label_name label_id class class_name classname class_id class_index "
    "class_label category category_name category_id target cls"
)
LABEL_NAMES = frozenset(_LABELS.split())
"""Names of columns with labels, written likewise; plurals are fields: several classes per image."""

_INTEGER = re.compile(r"([+-]?)0*([0-9]{1,18})(?:\.0*)?")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]+")
_UNLABELLED = -1
_FRACTIONAL = "is a fraction; classes are integers or names"


def find_column(names: Sequence[str], role: str, asked: str | None, path: Location) -> str | None:
    """Return the column with the paths or labels of a list, or None.

    A column called `path` (`label`) goes before its synonyms; case and blanks do not matter.

    Args:
        names: the columns.
        role: `path` or `label`.
        asked: name given by the user; None: found by name.
        path: the list, for messages.

    Raises:
        SourceError: several columns may be meant.
    """
    if asked is not None and asked in names:
        return _only(names, [asked], role, path)
    accepted = PATH_NAMES if role == "path" else LABEL_NAMES
    for wanted in ({_plain(asked)},) if asked is not None else ({role}, accepted):
        found = [name for name in names if _plain(name) in wanted]
        if found:
            return _only(names, found, role, path)
    return None


def _only(names: Sequence[str], found: list[str], role: str, path: Location) -> str:
    if len(found) > 1 or names.count(found[0]) > 1:
        raise SourceError(
            f"{path} has several columns that may be the {role}: {', '.join(found)}. Choose one "
            f"with --{role}-column, and give each column its own name."
        )
    return found[0]


def looks_like_header(cells: Sequence[str]) -> bool:
    """Return whether a first line without a column of paths names columns nevertheless."""
    return (
        len(cells) > 1
        and any(_plain(cell) in LABEL_NAMES for cell in cells)
        and not any("/" in cell or "." in cell for cell in cells)
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def parse_label(value: object) -> str:
    """Return the class of a cell; empty if it is unlabelled.

    Unlabelled are empty cells, None, NaN (also as text) and -1. Integers are numbers, however they
    are written: 7, `007`, 7.0 and `7.0` are one class. Everything else is a name, without the
    blanks around it.

    Raises:
        ValueError: it is no class; the message is a clause.
    """
    if isinstance(value, str):
        return _parse_text(value)  # few texts, in many rows
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple | dict):
        raise ValueError("is a list or an object; give one class per image")
    text = text_of(value)
    if isinstance(value, float) and not _INTEGER.fullmatch(text):
        raise ValueError(_FRACTIONAL)
    return _parse_text(text)


@lru_cache(maxsize=10_000)
def _parse_text(text: str) -> str:
    text = text_of(text)
    if not text or text.lower() == "nan":
        return ""
    integer = _INTEGER.fullmatch(text)
    if integer is None:
        if _FRACTION.fullmatch(text):
            raise ValueError(_FRACTIONAL)
        return text
    number = int(integer[1] + integer[2])
    if number < _UNLABELLED:
        raise ValueError("is negative; classes are 0 or more, and -1 is unlabelled")
    return "" if number == _UNLABELLED else str(number)


def text_of(value: Any) -> str:
    """Return a cell as text without the blanks around it; integers in floats as integers.

    Raises:
        ValueError: it is not UTF-8; the message is a clause.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
        text.encode()
    except UnicodeError:
        raise ValueError("is not UTF-8; save the list as UTF-8") from None
    return text.strip()
