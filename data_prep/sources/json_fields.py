"""The JSON of a sample, read so that whatever is in it neither ends the command nor is passed on.

A sample is an image first: what cannot be used of its JSON is left out or replaced, and noted.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_JSON_BYTES = 64 * 2**20
"""Longest JSON member that is read."""

MAX_DEPTH = 100
"""Deepest nesting that is kept: far below what readers of any language take."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_DIGITS = 4_300  # of integers; more are refused by Python's own reader

DAMAGED = "JSON left out: damaged"
TOO_DEEP = f"JSON left out: nested deeper than {MAX_DEPTH}"
TOO_LONG = f"JSON left out: more than {MAX_JSON_BYTES // 2**20} MiB"
LEFT_OUT = frozenset({DAMAGED, TOO_DEEP, TOO_LONG})
"""Notes on a JSON of which nothing is kept."""
NOT_UTF8 = "JSON not in UTF-8: characters replaced"
SURROGATES = "JSON with lone surrogates: characters replaced"
NOT_FINITE = "JSON with NaN or Infinity: replaced by null"
LONG_NUMBERS = f"JSON with numbers of more than {_MAX_DIGITS:,} digits: kept as text"
REPEATED = "JSON with repeated names: the last value kept"


@dataclass(frozen=True, kw_only=True)
class JsonFields:
    """What could be read of a JSON."""

    values: dict[str, Any] = field(default_factory=dict)
    """Its fields; those of another value than an object are in one field, `json`."""
    notes: tuple[str, ...] = ()
    """What was left out or replaced, sorted."""


def parse_fields(data: bytes) -> JsonFields:
    """Return the fields of a JSON; every value can be written as standard JSON again."""
    notes: set[str] = set()
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        notes.add(NOT_UTF8)
        text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    try:
        values = decode_json(text, notes.add)
        cleaned = _clean(values, notes.add, 0)
    except (RecursionError, _TooDeepError):
        return JsonFields(notes=(TOO_DEEP,))
    except ValueError:
        return JsonFields(notes=(DAMAGED,))
    fields = cleaned if isinstance(cleaned, dict) else {"json": cleaned}
    return JsonFields(values=fields, notes=tuple(sorted(notes)))


def clean_fields(fields: Mapping[str, Any]) -> JsonFields:
    """Return fields from elsewhere, such as a row of a list, as they can be written in a JSON.

    Bytes become text; values of types that JSON lacks, such as dates, their text.

    Raises:
        ValueError: they are nested deeper than `MAX_DEPTH`; the message is a clause.
    """
    notes: set[str] = set()
    try:
        values = _clean(dict(fields), notes.add, 0)
    except (RecursionError, _TooDeepError):
        raise ValueError(f"is nested deeper than {MAX_DEPTH}") from None
    return JsonFields(values=values, notes=tuple(sorted(notes)))


class _TooDeepError(Exception):
    """A value is nested deeper than `MAX_DEPTH`."""


def decode_json(text: str, note: Callable[[str], object]) -> Any:
    """Return the value of a JSON; numbers of too many digits for Python are kept as text.

    Args:
        text: the JSON.
        note: called with a note on what was replaced.

    Raises:
        ValueError, RecursionError: it is not JSON, or nested too deeply.
    """

    def read_integer(text: str) -> int | str:
        if len(text) <= _MAX_DIGITS:
            return int(text)
        note(LONG_NUMBERS)
        return text

    def read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            note(REPEATED)
        return values

    return json.JSONDecoder(parse_int=read_integer, object_pairs_hook=read_pairs).decode(text)


def _clean(value: Any, note: Callable[[str], object], depth: int) -> Any:
    """Return a value as it can be written in standard JSON, in UTF-8."""
    if depth > MAX_DEPTH:
        raise _TooDeepError
    match value:
        case str():
            return _clean_text(value, note)
        case float() if not math.isfinite(value):
            note(NOT_FINITE)
            return None
        case bytes():
            return _decode(value, note)
        case list() | tuple():
            return [_clean(one, note, depth + 1) for one in value]
        case dict():
            return {
                _clean_text(str(name), note): _clean(one, note, depth + 1)
                for name, one in value.items()
            }
    return value if isinstance(value, int | float | None) else _clean_text(str(value), note)


def _decode(data: bytes, note: Callable[[str], object]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        note(NOT_UTF8)
        return data.decode("utf-8", "replace")


def _clean_text(text: str, note: Callable[[str], object]) -> str:
    if _SURROGATE.search(text):
        note(SURROGATES)
        return _SURROGATE.sub("\ufffd", text)
    return text
