"""JSON is read as its dataclass declares; mistakes name their place and what is legal."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from data_prep.bounds import Amount, Count, Matching
from data_prep.validation import parse_json


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a content."""

    name: Annotated[str, Matching("[a-z]+", "lower-case letters")]
    sizes: tuple[Count, ...]
    weight: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class Content:
    """A content."""

    parts: tuple[Part, ...]
    counts: dict[str, Count]


VALUES: dict[str, Any] = {
    "parts": [{"name": "a", "sizes": [1, 2], "weight": 1}, {"name": "b", "sizes": [], "x": 0}],
    "counts": {"half a character \udcff": 3},
}


def test_values_are_read_as_declared_and_other_fields_ignored() -> None:
    content = parse_json(json.dumps(VALUES), Content)
    assert content == Content(
        parts=(Part(name="a", sizes=(1, 2), weight=1.0), Part(name="b", sizes=())),
        counts={"half a character \udcff": 3},
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"name": "A"}, "parts[1].name is 'A', and must be lower-case letters"),
        ({"name": None}, "parts[1].name is null, and must be text"),
        ({"sizes": [1, 0]}, "parts[1].sizes[1] is 0, and must be 1 or more"),
        ({"sizes": "1"}, "parts[1].sizes is '1', and must be a list"),
        (
            {"sizes": ["1"]},
            "parts[1].sizes[0] is '1', and must be an integer (write it without quotes)",
        ),
        ({"sizes": [1.0]}, "parts[1].sizes[0] is 1.0, and must be an integer"),
        ({"sizes": [True]}, "parts[1].sizes[0] is True, and must be an integer"),
        ({"weight": float("nan")}, "parts[1].weight is nan, and must be 0 or more"),
        ({"weight": "1"}, "parts[1].weight is '1', and must be a number (write it without quotes)"),
    ],
)
def test_mistakes_are_named(part: dict[str, Any], message: str) -> None:
    first, second = VALUES["parts"]
    text = json.dumps(VALUES | {"parts": [first, second | part]})
    with pytest.raises(ValueError, match="and must be") as caught:
        parse_json(text, Content)
    assert str(caught.value) == message


def test_all_mistakes_are_counted_and_the_first_named() -> None:
    with pytest.raises(ValueError, match="and 2 more mistakes") as caught:
        parse_json('{"parts": [{}, 3, {}], "counts": {"c": -1, "d": 0}}', Content)
    assert str(caught.value).startswith("parts[0].name is missing; parts[0].sizes is missing; ")


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000])
def test_other_texts_are_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="it is not valid JSON"):
        parse_json(text, Content)
    with pytest.raises(ValueError, match="it is 3, and must be an object"):
        parse_json("3", Content)
