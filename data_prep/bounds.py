"""Bounds of numbers that are declared in annotations, `Annotated[int, Ge(1)]`, and their check.

One declaration serves the check, the message and the help. pydantic knows the same annotations.
"""

import dataclasses
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MultipleOf, Predicate

Count: TypeAlias = Annotated[int, Ge(1)]
"""An integer of at least 1."""
Whole: TypeAlias = Annotated[int, Ge(0)]
"""An integer of at least 0."""
Positive: TypeAlias = Annotated[float, Gt(0)]
"""A number above 0."""
Amount: TypeAlias = Annotated[float, Ge(0)]
"""A number of at least 0."""
Fraction: TypeAlias = Annotated[float, Interval(gt=0, le=1)]
"""A part of a whole, which is not empty."""
Probability: TypeAlias = Annotated[float, Interval(ge=0, le=1)]
"""A number from 0 to 1."""
Rate: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
"""A number from 0 to below 1."""
Seed: TypeAlias = Annotated[int, Interval(ge=-(2**63), lt=2**63)]
"""An integer that fits into 64 bits."""


@dataclasses.dataclass(frozen=True)
class Span(GroupedMetadata):
    """Annotation of a pair (from, to) of numbers above 0 that do not fall."""

    most: float | None = None
    """Upper bound of both; None for none."""

    def __iter__(self) -> Iterator[Predicate]:
        """Yield the check, for pydantic."""
        yield Predicate(self.holds)

    def holds(self, value: Any) -> bool:
        """Return whether a pair is such a range."""
        first, last = value
        return bool(0 < first <= last and (self.most is None or last <= self.most))

    def __str__(self) -> str:
        limit = "both above 0" if self.most is None else f"above 0 and at most {self.most:g}"
        return f"(from, to), {limit}"


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against the bounds in its annotation.

    Args:
        settings: the dataclass.
        prefix: before the names of fields in messages; with `--` they are named as options.

    Raises:
        ValueError: fields are outside; all are named.
    """
    mistakes = [
        f"{_shown(name, prefix)} is {value}; it must be {bounds_text(bounds)}."
        for name, hint in _bounded_fields(type(settings))  # type: ignore[arg-type]
        for value, bounds in _outside(hint, getattr(settings, name))
    ]
    if mistakes:
        raise ValueError(" ".join(mistakes))


def _shown(name: str, prefix: str) -> str:
    return f"{prefix}{name.replace('_', '-')}" if prefix == "--" else f"{prefix}{name}"


@cache
def _bounded_fields(cls: type[Any]) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that have bounds somewhere in their type."""
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return [(name, hints[name]) for name in names if bounds_in(hints[name])]


def _outside(hint: Any, value: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield each number outside its bounds, with these."""
    if value is None or isinstance(value, str):
        return
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is Annotated:
            bounds = own_bounds(hint)
            if not all(_holds(bound, value) for bound in bounds):
                yield value, bounds
            else:
                yield from _outside(arguments[0], value)
        case origin if origin in (Union, types.UnionType):
            several = isinstance(value, tuple | list)
            for part in arguments:
                if (_plain(part) is tuple) == several:
                    yield from _outside(part, value)
        case origin if origin is tuple and isinstance(value, tuple | list):
            parts = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
            for part, element in zip(parts, value, strict=False):
                yield from _outside(part, element)


def _plain(hint: Any) -> Any:
    """Return what a type is without its annotations and parameters."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_origin(hint) or hint


def _holds(bound: Any, value: Any) -> bool:
    match bound:
        case Ge(ge=least):
            return bool(value >= least)
        case Gt(gt=least):
            return bool(value > least)
        case Le(le=most):
            return bool(value <= most)
        case Lt(lt=most):
            return bool(value < most)
        case MultipleOf(multiple_of=divisor):
            return bool(value % divisor == 0)
    assert isinstance(bound, Span)
    return bound.holds(value)


def own_bounds(hint: Any) -> tuple[Any, ...]:
    """Return the bounds of an `Annotated` type itself, without those of its parts."""
    bounds: list[Any] = []
    for one in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        bounds += [*one] if isinstance(one, Interval) else [one]
    return tuple(one for one in bounds if isinstance(one, Ge | Gt | Le | Lt | MultipleOf | Span))


def bounds_in(hint: Any) -> tuple[Any, ...]:
    """Return the first bounds in a type: its own, or those of an alternative or element."""
    if own := own_bounds(hint):
        return own
    return next((found for part in get_args(hint) if (found := bounds_in(part))), ())


def bounds_text(bounds: tuple[Any, ...]) -> str:
    """Return in words what a number has to be: `from 0 to 1`."""
    least = {type(one): one for one in bounds}
    if {Ge(-(2**63)), Lt(2**63)} <= set(bounds):
        return "within 64 bits"
    if Ge in least and Le in least:
        return f"from {_number(least[Ge].ge)} to {_number(least[Le].le)}"
    words = []
    for one in bounds:
        match one:
            case Ge(ge=number):
                words.append(f"{_number(number)} or more")
            case Gt(gt=number):
                words.append(f"above {_number(number)}")
            case Le(le=number):
                words.append(f"at most {_number(number)}")
            case Lt(lt=number):
                words.append(f"below {_number(number)}")
            case MultipleOf(multiple_of=number):
                words.append(f"a multiple of {_number(number)}")
            case _:
                words.append(str(one))
    return " and ".join(words)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
