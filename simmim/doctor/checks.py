"""What a check finds, and the table of all of them."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem"]

WIDTH = 100
VERDICT_WIDTH, NAME_WIDTH = 9, 15


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at, and what to do about it."""

    name: str
    verdict: Verdict
    """`problem`: training would fail, or could not be of use."""
    found: str
    change: str = ""
    """What to change; empty where nothing needs to be."""


def attempt(name: str, examine: Callable[[], Iterable[Check]]) -> list[Check]:
    """Return what `examine` finds; what it raises is a problem, with its message.

    Training would have met the same error later, with less to say about it.
    """
    found: list[Check] = []
    try:
        found.extend(examine())
    except Exception as error:  # whatever it is, the other checks are still worth having
        found.append(problem(name, error))
    return found


def problem(name: str, error: Exception) -> Check:
    """Return the problem that an error is."""
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, ValueError | OSError):  # of torch for example: its first line says it
        text = f"{type(error).__name__}: {text.splitlines()[0]}"
    return Check(name=name, verdict="problem", found=text)


def table(checks: Sequence[Check]) -> str:
    """Return the checks for a person, and what follows from them."""
    lines = []
    for check in checks:
        lines += _block(check.verdict, check.name, check.found)
        if check.change:
            lines += _block("", "", f"→ {check.change}")
    problems = sum(check.verdict == "problem" for check in checks)
    warnings = sum(check.verdict == "warning" for check in checks)
    verdict = "training would fail" if problems else "training can start"
    lines += ["", f"{_counted(problems, 'problem')}, {_counted(warnings, 'warning')}: {verdict}."]
    return "\n".join(lines)


def _block(verdict: str, name: str, text: str) -> list[str]:
    """Return text in its column, beside verdict and name."""
    indent = VERDICT_WIDTH + NAME_WIDTH
    wrap = textwrap.TextWrapper(
        WIDTH - indent, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    ).wrap
    wrapped = [part for line in text.splitlines() for part in wrap(line) or [""]] or [""]
    first = f"{verdict:<{VERDICT_WIDTH}}{name:<{NAME_WIDTH}}{wrapped[0]}".rstrip()
    return [first, *(f"{'':{indent}}{line}" for line in wrapped[1:])]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
