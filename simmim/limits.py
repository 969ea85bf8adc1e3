"""Range checks of settings; messages name the field, the value and the legal range."""

from typing import Any


def check_least(settings: Any, least: float, *names: str) -> None:
    """Raise ValueError unless each of these fields is `least` or more; null is fine."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more.")


def check_shares(settings: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is above 0 and at most 1."""
    for name in names:
        if not 0 < getattr(settings, name) <= 1:
            raise ValueError(
                f"{name} is {getattr(settings, name)}; it must be above 0 and at most 1."
            )


def check_probabilities(settings: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is from 0 to 1."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be from 0 to 1.")


def check_rates(settings: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is 0 or more and below 1."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            value = getattr(settings, name)
            raise ValueError(f"{name} is {value}; it must be 0 or more and below 1.")


def check_span(settings: Any, name: str, *, most: float | None = None) -> None:
    """Raise ValueError unless a field is a range (from, to) above 0 and at most `most`."""
    first, last = getattr(settings, name)
    if not 0 < first <= last or (most is not None and last > most):
        limit = "both above 0" if most is None else f"above 0 and at most {most}"
        raise ValueError(f"{name} is {getattr(settings, name)}; it must be (from, to), {limit}.")
