"""The Markdown report of results; imports no torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Outcome = Mapping[str, Any]
Cells = Mapping[str, Outcome]

SHARES = ("of the peak", "of the ceiling")


def write_report(document: Mapping[str, Any]) -> str:
    """Return the report of a document of `Results`."""
    cells: Cells = document["cells"]
    parts = [
        "# simmim bench gpu",
        _heading(document),
        _failures(cells),
        _machine(cells),
        _selftest(cells),
        _steps(cells),
        _attention(cells),
        _loader(cells),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(document: Mapping[str, Any]) -> str:
    settings, outcomes = document["settings"], [one["status"] for one in document["cells"].values()]
    counts = ", ".join(f"{outcomes.count(one)} {one}" for one in ("passed", "failed", "skipped"))
    lines = [f"`{settings['command']}`, seed {settings.get('seed', 0)}: {counts}."]
    if settings["dry run"]:
        lines.append("**A dry run on a CPU in tiny sizes: the figures mean nothing.**")
    return "\n\n".join(lines)


def _failures(cells: Cells) -> str:
    rows = [
        (name, one["status"], one.get("message", ""))
        for name, one in cells.items()
        if one["status"] in ("failed", "skipped")
    ]
    rows.sort(key=lambda row: row[1])
    return _section("Failed and skipped", ("cell", "outcome", "why"), rows)


def _machine(cells: Cells) -> str:
    values = cells.get("machine/environment", {}).get("values", {})
    rows = [
        (name, _text(value)) for name, value in values.items() if not isinstance(value, Mapping)
    ]
    packages = values.get("packages", {})
    if packages:
        listed = ", ".join(f"{name} {one or 'missing'}" for name, one in packages.items())
        rows.append(("packages", listed))
    for name, figure, unit in (
        ("matrix product", "flops per second", "TFLOP/s in bf16"),
        ("copy", "bytes per second", "TB/s read and written"),
    ):
        found = cells.get(f"machine/{name}", {}).get("values", {})
        if found:
            rows.append(
                (f"{name}, measured", f"{found[figure] / 1e12:.4g} {unit}, {_spread(found)}")
            )
    return _section("Machine", ("", ""), rows)


def _selftest(cells: Cells) -> str:
    rows = [(name, one["status"], _found(one)) for name, one in _of(cells, "selftest")]
    rows += [
        (name, one["status"], _found(one))
        for name, one in _of(cells, "machine")
        if name == "process groups"
    ]
    return _section("Self-test", ("check", "outcome", "found"), rows)


def _steps(cells: Cells) -> str:
    rows = [
        (
            name,
            f"{values['images per second']:,.1f}",
            _spread(values),
            str(values["batch"]),
            *_shares(values),
            _text(values["peak memory GiB"]),
            f"{values['seconds of the first step']:.1f}",
        )
        for name, values in _passed(cells, "step")
    ]
    heads = ("step", "images/s", "spread", "batch", *SHARES, "GiB", "first step, s")
    text = _section("Training steps", heads, rows)
    note = (
        "Forward, backward and AdamW of SimMIM in bf16. Peak: the measured matrix product, for the "
        "FLOPs that the model requires. Ceiling: the least time of all operations and bytes as "
        "implemented, one after another (docs/performance.md)."
    )
    return f"{text}\n\n{note}" if text else ""


def _attention(cells: Cells) -> str:
    rows = [
        (
            name,
            f"{1e3 * values['seconds']:.3g}",
            _spread(values),
            f"{values['scores per second'] / 1e9:.4g}",
            *_shares(values),
        )
        for name, values in _passed(cells, "attention")
    ]
    heads = ("tokens, path", "ms", "spread", "10⁹ scores/s", *SHARES)
    return _section("Window attention, forward and backward", heads, rows)


def _loader(cells: Cells) -> str:
    rows = [(name, one["status"], _found(one)) for name, one in _of(cells, "loader")]
    return _section("Loader against step", ("cell", "outcome", "found"), rows)


def _of(cells: Cells, section: str) -> Iterator[tuple[str, Outcome]]:
    """Yield the cells of a section, named without it."""
    for name, one in cells.items():
        first, _, rest = name.partition("/")
        if first == section:
            yield rest, one


def _passed(cells: Cells, section: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what the cells of a section have measured."""
    for name, one in _of(cells, section):
        if one["status"] == "passed":
            yield name, one["values"]


def _shares(values: Mapping[str, Any]) -> tuple[str, str]:
    shares = [values.get(f"share of the {limit}") for limit in ("measured peak", "ceiling")]
    peak, ceiling = ("" if share is None else f"{share:.1%}" for share in shares)
    return peak, ceiling


def _spread(values: Mapping[str, Any]) -> str:
    """Return the quartiles of the repeats, relative to their median."""
    median = values["seconds"]
    lower, upper = (values[f"{name} quartile"] / median - 1 for name in ("lower", "upper"))
    return f"{lower:+.1%} {upper:+.1%}"


def _found(outcome: Outcome) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in outcome["values"].items())


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"## {title}\n\n{table(heads, rows)}" if rows else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; text in its cells is put on one line."""
    lines = [_row(heads), _row(["---"] * len(heads))]
    return "\n".join([*lines, *(_row(row) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "/") for cell in cells) + " |"
