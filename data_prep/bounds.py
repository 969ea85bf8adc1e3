"""Bounds that are declared in annotations, `Annotated[int, Bounds(ge=1)]`.

One declaration serves the check, the message and the help. pydantic reads it as annotated_types'
own, which is imported for it alone: settings are also built where neither is installed.
"""

import dataclasses
import math
import re
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, TypeAlias, Union, get_args, get_origin, get_type_hints

# ruff: noqa: PLC0415 (see above)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Annotation of a number; None for no bound."""

    ge: float | None = None
    """Least value."""
    gt: float | None = None
    """The value is above this one."""
    le: float | None = None
    """Largest value."""
    lt: float | None = None
    """The value is below this one."""
    multiple_of: int | None = None
    """Divisor of the value."""
    __is_annotated_types_grouped_metadata__: ClassVar = True

    def __iter__(self) -> Iterator[Any]:
        """Yield each bound as pydantic reads it; text and booleans do not count as numbers."""
        from annotated_types import Ge, Gt, Le, Lt, MultipleOf
        from pydantic import Strict

        yield Strict()
        for kind, value in ((Ge, self.ge), (Gt, self.gt), (Le, self.le), (Lt, self.lt)):
            if value is not None:
                yield kind(value)
        if self.multiple_of is not None:
            yield MultipleOf(self.multiple_of)

    def hold(self, value: Any) -> bool:
        """Return whether a number is within them."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        """Return in words what a number has to be: `from 0 to 1`."""
        if (self.ge, self.lt) == (-(2**63), 2**63):
            return "within 64 bits"
        if (self.gt, self.lt) == (-math.inf, math.inf):
            return "finite"
        if self.ge is not None and self.le is not None:
            return f"from {_number(self.ge)} to {_number(self.le)}"
        words = (
            ("{} or more", self.ge),
            ("above {}", self.gt),
            ("at most {}", self.le),
            ("below {}", self.lt),
            ("a multiple of {}", self.multiple_of),
        )
        return " and ".join(text.format(_number(one)) for text, one in words if one is not None)


@dataclasses.dataclass(frozen=True)
class Span:
    """Annotation of a pair (from, to) of numbers above 0 that do not fall."""

    most: float | None = None
    """Upper bound of both; None for none."""
    __is_annotated_types_grouped_metadata__: ClassVar = True

    def __iter__(self) -> Iterator[Any]:
        """Yield the check as pydantic reads it."""
        from annotated_types import Predicate

        yield Predicate(self.hold)

    def hold(self, value: Any) -> bool:
        """Return whether a pair is such a range."""
        first, last = value
        return bool(0 < first <= last and (self.most is None or last <= self.most))

    def __str__(self) -> str:
        """Return in words what a pair has to be."""
        limit = "both above 0" if self.most is None else f"above 0 and at most {self.most:g}"
        return f"(from, to), {limit}"


@dataclasses.dataclass(frozen=True)
class Matching:
    """Annotation of a text that a regular expression has to match as a whole."""

    pattern: str
    """The regular expression."""
    about: str
    """The texts that it matches, in words."""
    __is_annotated_types_grouped_metadata__: ClassVar = True

    def __iter__(self) -> Iterator[Any]:
        """Yield the check as pydantic reads it."""
        from annotated_types import Predicate

        yield Predicate(self.hold)

    def hold(self, value: Any) -> bool:
        """Return whether a text is matched."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        """Return in words what a text has to be."""
        return self.about


Bound: TypeAlias = Bounds | Span | Matching
OUT_OF_BOUNDS = (
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
    *("multiple_of", "predicate_failed"),
)
"""pydantic's names of the mistakes that bounds find."""
Count: TypeAlias = Annotated[int, Bounds(ge=1)]
"""An integer of at least 1."""
Whole: TypeAlias = Annotated[int, Bounds(ge=0)]
"""An integer of at least 0."""
Finite: TypeAlias = Annotated[float, Bounds(gt=-math.inf, lt=math.inf)]
"""A number that is neither infinite nor NaN."""
Positive: TypeAlias = Annotated[float, Bounds(gt=0)]
"""A number above 0."""
Amount: TypeAlias = Annotated[float, Bounds(ge=0)]
"""A number of at least 0."""
Fraction: TypeAlias = Annotated[float, Bounds(gt=0, le=1)]
"""A part of a whole, which is not empty."""
Probability: TypeAlias = Annotated[float, Bounds(ge=0, le=1)]
"""A number from 0 to 1."""
Rate: TypeAlias = Annotated[float, Bounds(ge=0, lt=1)]
"""A number from 0 to below 1."""
Seed: TypeAlias = Annotated[int, Bounds(ge=-(2**63), lt=2**63)]
"""An integer that fits into 64 bits."""


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against the bounds in its annotation.

    Args:
        settings: the dataclass.
        prefix: before the names of fields in messages; with `--` they are named as options.

    Raises:
        ValueError: fields are outside; all are named.
    """
    mistakes = [
        f"{_shown(name, prefix)} is {value}; it must be {bounds}."
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


def _outside(hint: Any, value: Any) -> Iterator[tuple[Any, Bound]]:
    """Yield each number outside its bounds, with these."""
    if value is None or isinstance(value, str):
        return
    parts, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        bounds = own_bounds(hint)
        if bounds is None or bounds.hold(value):
            yield from _outside(parts[0], value)
        else:
            yield value, bounds
    elif origin in (Union, types.UnionType):
        several = isinstance(value, tuple | list)
        for part in parts:
            if (_plain(part) is tuple) == several:
                yield from _outside(part, value)
    elif origin is tuple and isinstance(value, tuple | list):
        elements = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        for part, element in zip(elements, value, strict=False):
            yield from _outside(part, element)


def _plain(hint: Any) -> Any:
    """Return what a type is without its annotations and parameters."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_origin(hint) or hint


def own_bounds(hint: Any) -> Bound | None:
    """Return the bounds of an `Annotated` type itself, without those of its parts."""
    annotations = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((one for one in annotations if isinstance(one, Bound)), None)


def bounds_at(hint: Any, place: Sequence[str | int]) -> Bound | None:
    """Return the bounds at a place in a type: names of fields, keys and positions."""
    for part in place:
        for section in shapes_in(hint):
            hint = get_type_hints(section, include_extras=True).get(str(part), hint)
            break
    return bounds_in(hint)


def shapes_in(hint: Any) -> Iterator[type[Any]]:
    """Yield the dataclasses and typed dictionaries that a type refers to."""
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "__total__")):
        yield hint
    for part in get_args(hint):
        yield from shapes_in(part)


def bounds_in(hint: Any) -> Bound | None:
    """Return the first bounds in a type: its own, or those of an alternative or element."""
    if own := own_bounds(hint):
        return own
    return next((found for part in get_args(hint) if (found := bounds_in(part))), None)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
