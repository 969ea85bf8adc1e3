"""Labels of lists: what the label of a cell is, and whether all labels fit together."""

import math
import re
from collections import Counter
from functools import lru_cache
from typing import Any

from data_prep.format.kinds import describe_kinds
from data_prep.format.labels import MAX_CLASSES
from data_prep.format.storage import Location
from data_prep.format.text import count_noun
from data_prep.sources.files import SourceError

_MISSING = (
    "#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null"
)
MISSING = frozenset({*_MISSING.split(), "#N/A N/A"})
"""Texts that mean that there is no label, as pandas reads them; `nan` in any case."""

_INTEGER = re.compile(r"([+-]?)0*([0-9]{1,18})(?:\.0*)?")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]+")
_UNLABELLED = -1
_FRACTIONAL = "is a fraction; classes are integers or names"
_EMPTY = "empty"
_MOST_SHOWN = 40


def parse_label(value: object) -> str:
    """Return the class of a cell; empty if it is unlabelled.

    Unlabelled are empty cells, None, NaN, -1 and the words of `MISSING`. Integers are numbers,
    however they are written: 7, `007`, 7.0 and `7.0` are one class. Everything else is a name,
    without the blanks around it.

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
    if not text or text in MISSING or text.lower() == "nan":
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
        raise ValueError(
            "is not UTF-8, or holds half a character (a lone surrogate); save the list as UTF-8"
        ) from None
    return text.strip()


class LabelTally:
    """Counts the labels of a list, and finds those that do not fit together.

    Integers keep their values as labels, so that one name among them would renumber all classes.

    Attributes:
        unlabelled: cell that means no label → number of rows.
        unusable: number of rows that are rejected whatever their label is.
    """

    def __init__(self, path: Location) -> None:
        self._path = path
        self._rows = 0
        self._integer: tuple[str, str] | None = None
        self._name: tuple[str, str] | None = None
        self._large: tuple[str, str] | None = None
        self.unlabelled: Counter[str] = Counter()
        self.unusable = 0

    def add(self, place: str, value: object, label: str) -> None:
        """Count a row.

        Args:
            place: its place in the list, for messages.
            value: the cell.
            label: the class that `parse_label` found in it.
        """
        self._rows += 1
        if not label:
            word = "" if value is None else text_of(value)
            self.unlabelled[repr(word) if word else _EMPTY] += 1
        elif not (label.isascii() and label.isdecimal()):
            self._name = self._name or (place, label)
        elif len(label) >= len(str(MAX_CLASSES)):
            self._large = self._large or (place, label)
        else:
            self._integer = self._integer or (place, label)

    def check(self) -> None:
        """Check that all labels are names or all are integers below `MAX_CLASSES`.

        Raises:
            SourceError: they are not; the message names the line.
        """
        integer = self._integer or self._large
        if self._name is not None and integer is not None:
            raise SourceError(
                f"{self._path} has integers and names as labels: {_shown(integer)}, "
                f"{_shown(self._name)}. Integers keep their values as labels, so all must be "
                "integers or all names (n1 in place of 1); leave the label of an unlabelled image "
                "empty."
            )
        if self._large is not None:
            raise SourceError(
                f"{self._path} has {_shown(self._large)} as label: integers are the numbers of the "
                f"classes, below {MAX_CLASSES:,}. Write identifiers as names (n{MAX_CLASSES} in "
                f"place of {MAX_CLASSES}), or number the classes from 0."
            )

    def describe(self, repeated: int) -> str:
        """Return how many rows are unlabelled, as a clause after a semicolon, or an empty text.

        The images found are the rows counted and those that cannot be used, less the repeated ones.

        Args:
            repeated: number of rows counted that are the same as an earlier one.
        """
        count = self.unlabelled.total()
        if not count:
            return ""
        rows = count_noun(self._rows, "row")
        text = f"; {count:,} of {rows} unlabelled: {describe_kinds(self.unlabelled, 5)}"
        if self.unusable:
            text += f"; {count_noun(self.unusable, 'more row')} cannot be used"
        if repeated:
            text += f"; {count_noun(repeated, 'row')} listed again"
        return text


def _shown(found: tuple[str, str]) -> str:
    place, label = found
    cut = "…" * (len(label) > _MOST_SHOWN)
    return f"{label[:_MOST_SHOWN]!r}{cut} in {place}"
