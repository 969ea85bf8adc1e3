"""Bounds in annotations: what they let pass, what they refuse, and how they read."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from data_prep.bounds import (
    Bounds,
    Count,
    Fraction,
    Positive,
    Rate,
    Seed,
    Span,
    bounds_in,
    check_bounds,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options with every kind of bound."""

    count: Count = 1
    maybe: Count | None = None
    fraction: Fraction = 1.0
    rates: tuple[Rate, Rate] = (0.0, 0.9)
    weights: tuple[Positive, ...] | str = "auto"
    span: Annotated[tuple[float, float], Span(most=1)] = (0.1, 1.0)
    open_span: Annotated[tuple[float, float], Span()] = (2.0, 3.0)
    seed: Seed = 0
    channels: Annotated[int, Bounds(ge=32, multiple_of=32)] = 64
    share: Annotated[float, Bounds(gt=0, lt=1)] | None = 0.5
    free: float = -1.0


def test_values_within_bounds_pass() -> None:
    check_bounds(Options())
    check_bounds(Options(maybe=3, weights=(1.0, 2.0), seed=-(2**63), share=None))
    check_bounds(Options(span=(1.0, 1.0), fraction=1, rates=(0, 0)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count is 0; it must be 1 or more."),
        ({"maybe": -2}, "maybe is -2; it must be 1 or more."),
        ({"fraction": 0.0}, "fraction is 0.0; it must be above 0 and at most 1."),
        ({"fraction": float("nan")}, "fraction is nan; it must be above 0 and at most 1."),
        ({"rates": (0.5, 1.0)}, "rates is 1.0; it must be 0 or more and below 1."),
        ({"weights": (1.0, 0.0)}, "weights is 0.0; it must be above 0."),
        ({"span": (0.5, 0.1)}, "span is (0.5, 0.1); it must be (from, to), above 0 and at most 1."),
        ({"span": (0.5, 2.0)}, "it must be (from, to), above 0 and at most 1."),
        ({"open_span": (0.0, 2.0)}, "it must be (from, to), both above 0."),
        ({"seed": 2**63}, "it must be within 64 bits."),
        ({"channels": 48}, "channels is 48; it must be 32 or more and a multiple of 32."),
        ({"share": 1.0}, "share is 1.0; it must be above 0 and below 1."),
    ],
)
def test_values_outside_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        check_bounds(Options(**values))
    assert message in str(caught.value)


def test_all_mistakes_are_named_at_once_and_as_options() -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        check_bounds(Options(count=0, open_span=(3.0, 2.0)), "--")
    assert str(caught.value) == (
        "--count is 0; it must be 1 or more. "
        "--open-span is (3.0, 2.0); it must be (from, to), both above 0."
    )


def test_bounds_read_as_words() -> None:
    assert str(bounds_in(Count | None)) == "1 or more"
    assert str(bounds_in(tuple[Fraction, ...])) == "above 0 and at most 1"
    assert str(bounds_in(Annotated[int, Bounds(ge=0, le=1000)])) == "from 0 to 1,000"
    assert bounds_in(int | None) is None


def test_pydantic_reads_the_same_bounds() -> None:
    adapter = TypeAdapter(Options)
    assert adapter.validate_python({"count": 2, "maybe": None, "span": (0.5, 0.5)})
    wrong = {"count": 0, "maybe": 0, "rates": (0.5, 1.0), "span": (1.0, 0.5), "channels": 48}
    with pytest.raises(ValidationError) as caught:
        adapter.validate_python(wrong)
    assert [one["loc"] for one in caught.value.errors()] == [
        ("count",),
        ("maybe",),
        ("rates", 1),
        ("span",),
        ("channels",),
    ]
