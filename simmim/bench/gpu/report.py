"""The Markdown report of results; imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Outcome = Mapping[str, Any]


def write_report(document: Mapping[str, Any]) -> str:
    """Return the report of a document of `Results`."""
    cells: Mapping[str, Outcome] = document["cells"]
    parts = ["# simmim bench gpu", _heading(document), _machine(cells)]
    parts.append("## Self-test\n\n" + _selftest(cells))
    parts.append(_others(cells))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    lines = [f"`{settings['command']}`"]
    if settings["dry run"]:
        lines.append("**A dry run on a CPU in tiny sizes: the figures mean nothing.**")
    return "\n\n".join(lines)


def _machine(cells: Mapping[str, Outcome]) -> str:
    values = cells.get("machine/environment", {}).get("values", {})
    if not values:
        return ""
    rows = [
        (name, _text(value)) for name, value in values.items() if not isinstance(value, Mapping)
    ]
    packages = ", ".join(f"{name} {one or 'missing'}" for name, one in values["packages"].items())
    return "## Machine\n\n" + table(("", ""), [*rows, ("packages", packages)])


def _selftest(cells: Mapping[str, Outcome]) -> str:
    rows = [
        (name.partition("/")[2], one["status"], _detail(one))
        for name, one in cells.items()
        if name.startswith("selftest/")
    ]
    return table(("check", "outcome", "found"), rows)


def _others(cells: Mapping[str, Outcome]) -> str:
    rows = [
        (name, one["status"], _detail(one))
        for name, one in cells.items()
        if not name.startswith("selftest/") and name != "machine/environment"
    ]
    return "## Measurements\n\n" + table(("cell", "outcome", "found"), rows)


def _detail(outcome: Outcome) -> str:
    values = outcome.get("values", {})
    found = ", ".join(f"{name} {_text(value)}" for name, value in values.items())
    return "; ".join(part for part in (outcome.get("message", ""), found) if part)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; text in cells is put on one line."""
    lines = [_row(heads), _row(["---"] * len(heads))]
    return "\n".join([*lines, *(_row(row) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "/") for cell in cells) + " |"
