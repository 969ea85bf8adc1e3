"""The result of a check, and the table of all results."""

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from data_prep.format.text import count_noun
from simmim.engine.exit_codes import BAD_INPUT
from simmim.environment import process_environment

Verdict = Literal["ok", "warning", "problem"]

WIDTH = 100
VERDICT_WIDTH, NAME_WIDTH = 9, 15


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check."""

    name: str
    verdict: Verdict
    """`problem`: training would fail or be useless."""
    found: str
    change: str = ""
    """Advice on what to change; empty if nothing."""


def attempt(name: str, examine: Callable[[], Iterable[Check]]) -> list[Check]:
    """Return the results of `examine`; an exception becomes a problem with its message."""
    found: list[Check] = []
    try:
        found.extend(examine())
    except Exception as error:  # the other checks are still worth having
        found.append(problem(name, error))
    return found


def problem(name: str, error: Exception) -> Check:
    """Return an error as a problem."""
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, ValueError | OSError):  # from torch, say: the first line is enough
        text = f"{type(error).__name__}: {text.splitlines()[0]}"
    return Check(name=name, verdict="problem", found=text)


def table(checks: Sequence[Check]) -> str:
    """Return the results as a table for a person, with a verdict."""
    lines = []
    for check in checks:
        lines += _block(check.verdict, check.name, check.found)
        if check.change:
            lines += _block("", "", f"→ {check.change}")
    problems = sum(check.verdict == "problem" for check in checks)
    warnings = sum(check.verdict == "warning" for check in checks)
    verdict = "training would fail" if problems else "training can start"
    counts = f"{count_noun(problems, 'problem')}, {count_noun(warnings, 'warning')}"
    lines += ["", f"{counts}: {verdict}."]
    return "\n".join(lines)


def _block(verdict: str, name: str, text: str) -> list[str]:
    """Return text wrapped in its column, next to verdict and name."""
    indent = VERDICT_WIDTH + NAME_WIDTH
    wrap = textwrap.TextWrapper(
        WIDTH - indent, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    ).wrap
    wrapped = [part for line in text.splitlines() for part in wrap(line) or [""]] or [""]
    first = f"{verdict:<{VERDICT_WIDTH}}{name:<{NAME_WIDTH}}{wrapped[0]}".rstrip()
    return [first, *(f"{'':{indent}}{line}" for line in wrapped[1:])]


def print_checks(checks: Sequence[Check]) -> int:
    """Print the table on the main process, and return the exit code."""
    if process_environment().is_main:
        sys.stdout.write(table(checks) + "\n")
        sys.stdout.flush()
    return BAD_INPUT if any(check.verdict == "problem" for check in checks) else 0
