"""JSON whose fields a dataclass declares, with bounds in their annotations.

Numbers take bounds (see `data_prep.bounds`): those without would be read from text as well. Fields
of the JSON that the dataclass lacks are ignored. pydantic is imported by the first call.
"""

import json
import reprlib
from typing import TYPE_CHECKING, Any, TypeVar, cast

from data_prep.bounds import OUT_OF_BOUNDS, bounds_at

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# ruff: noqa: PLC0415 (see above)

Content = TypeVar("Content")
_ADAPTERS: "dict[type[Any], TypeAdapter[Any]]" = {}
_MOST_MISTAKES = 5
_LEGAL = {
    "bool_type": "true or false",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "mapping_type": "an object",
    "string_type": "text",
    "tuple_type": "a list",
}
"""What a value must be, by pydantic's name of the mistake."""


def parse_json(text: str | bytes, content: type[Content]) -> Content:
    """Return what a JSON holds.

    Args:
        text: the JSON, in UTF-8 if bytes.
        content: its type, such as a dataclass.

    Raises:
        ValueError: it is not valid JSON or holds something else; the message is a clause.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    return validate(values, content)


def validate(values: Any, content: type[Content]) -> Content:
    """Return what the values of a JSON are; see `parse_json`."""
    from pydantic import ValidationError

    try:
        return cast(Content, adapter(content).validate_python(values))
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        lines = [_describe(mistake, content) for mistake in mistakes[:_MOST_MISTAKES]]
        if len(mistakes) > len(lines):
            lines.append(f"and {len(mistakes) - len(lines):,} more mistakes")
        raise ValueError("; ".join(lines)) from None


def adapter(content: type[Any]) -> "TypeAdapter[Any]":
    """Return the cached validator of a type; building one is the slow part."""
    from pydantic import TypeAdapter

    if content not in _ADAPTERS:
        _ADAPTERS[content] = TypeAdapter(content)
    return _ADAPTERS[content]


def _describe(mistake: Any, content: Any) -> str:
    place, kind, value = mistake["loc"], mistake["type"], mistake["input"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    where = where.removeprefix(".")
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        return f"{where}: {mistake['ctx']['error']}".removeprefix(": ")
    bounds = bounds_at(content, place) if kind in OUT_OF_BOUNDS else None
    legal = bounds or _LEGAL.get(kind) or mistake["msg"].removeprefix("Input should be ")
    is_text = isinstance(value, str)
    shown = "null" if value is None else repr(value)[:100] if is_text else reprlib.repr(value)
    hint = " (write it without quotes)" if kind in ("int_type", "float_type") and is_text else ""
    return f"{where or 'it'} is {shown}, and must be {legal}{hint}"
