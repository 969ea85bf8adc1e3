"""Values of config fields: integers and real numbers of any library, checked and made Python's."""

import numbers
import operator
from typing import SupportsIndex

Pair = tuple[int, int]

MOST_STAGES = 8
"""Maximum number of stages."""
MOST_PIXELS = 2**24
"""Maximum side of images, patches and windows."""


def count(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """Return an integer of any type, such as numpy's, as an int.

    Raises:
        ValueError: it is not an integer, or outside `least` to `most`; names the field.
    """
    found = as_int(value)
    if found is None or found < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}.")
    if most is not None and found > most:
        shown = found if found < 10**18 else "a larger number"
        raise ValueError(f"{name} is {shown}; it must be at most {most}.")
    return found


def as_int(value: object) -> int | None:
    """Return an integer of any type but bool as an int; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of several numbers
        return None


def set_count(config: object, name: str, *, least: int, most: int | None = None) -> None:
    """Check a field of a frozen config that counts something, and store it as an int.

    Raises:
        ValueError: see `count`.
    """
    object.__setattr__(config, name, count(name, getattr(config, name), least=least, most=most))


def number(name: str, value: object) -> float:
    """Return a real number of any type, such as numpy's, as a float; an int stays one.

    Raises:
        ValueError: it is not a number; names the field.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    whole = as_int(value)
    return float(value) if whole is None else whole


def counts_of_stages(name: str, values: object, *, most: int) -> tuple[int, ...]:
    """Return a list with an integer of at least 1 for each stage, as a tuple.

    Raises:
        ValueError: it is not one; names the field.
    """
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{name} is {values!r}; it must list one number for each stage.")
    if len(values) > MOST_STAGES:
        raise ValueError(f"{name} lists {len(values):,} stages; there are at most {MOST_STAGES}.")
    return tuple(
        count(f"{name}[{stage}]", value, least=1, most=most) for stage, value in enumerate(values)
    )


def pair(name: str, value: object) -> Pair:
    """Return (height, width) in pixels or tokens; a single number is both.

    Raises:
        ValueError: it is neither one number nor two; names the field.
    """
    values = (value, value) if as_int(value) is not None else value
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"{name} is {value!r}; it must be a number or (height, width).")
    height, width = values
    return (
        count(name, height, least=1, most=MOST_PIXELS),
        count(name, width, least=1, most=MOST_PIXELS),
    )
