"""HTML report of a run: charts, pictures, environment and recipe in one file without network."""

import base64
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from data_prep.format.atomic import atomic_write_text
from data_prep.format.text import count_noun
from simmim.engine.metrics_file import read_lines
from simmim.engine.monitor.progress import duration
from simmim.engine.run import RunFolder
from simmim.recipe import read_values
from simmim.report.charts import STYLE, Series, chart
from simmim.report.section import NOTHING_MORE, ReportSection

Lines = Sequence[dict[str, Any]]

KNOWN = {
    "step",
    "epoch",
    "samples",
    "loss",
    "validation_loss",
    "lr",
    "grad_norm",
    "images_per_second",
    "data_wait",
    "mfu",
    "device_memory_gib",
    "host_memory_gib",
    "eta_seconds",
    "processes",
}
"""Figures of every training with a tile or chart of their own; the others are drawn after these, by
name."""


def write_report(run: RunFolder, section: ReportSection = NOTHING_MORE) -> Path:
    """Write the HTML report of a run and return its path.

    Args:
        run: a run folder.
        section: what the task of the run adds.

    Raises:
        ValueError: the folder has neither recipe nor metrics, or its metrics cannot be read.
    """
    if not (run.recipe.is_file() or run.metrics.is_file()):
        raise ValueError(
            f"{run.path} is not a run folder, which has a recipe.yaml: give the folder of a "
            "training."
        )
    lines = run.read_metrics()
    damaged = sum(line.step is None for line in read_lines(run.metrics))
    if damaged and not lines:
        raise ValueError(
            f"{run.metrics} cannot be read: none of its lines is JSON with a step. Repair it, or "
            "remove it."
        )
    if damaged:
        sys.stderr.write(
            f"WARNING: the report leaves out {count_noun(damaged, 'line')} of {run.metrics}, which "
            "cannot be read.\n"
        )
    atomic_write_text(run.report, page(run, lines, section))
    return run.report


def page(run: RunFolder, lines: Lines, section: ReportSection) -> str:
    """Return the report as HTML."""
    parts = [
        f"<h1>{escape(run.path.resolve().name)}</h1>",
        f'<p class="when">written {time.strftime("%Y-%m-%d %H:%M:%S %Z")}</p>',
        _summary(lines, section),
        _charts(lines, section) if lines else "<p>Nothing has been logged yet.</p>",
        _pictures(run),
        _description(run, section),
        _bad_samples(run),
        _environment(run),
        _text("Recipe", run.recipe),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.path.resolve().name)}</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _summary(lines: Lines, section: ReportSection) -> str:
    """Return tiles with the latest values of the main figures."""
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    tiles = []
    baselines = [(key, f"baseline: {name}", "{:.4f}") for key, name in section.baselines.items()]
    for key, title, form in (
        ("step", "step", "{:,}"),
        ("epoch", "epoch", "{:.2f}"),
        ("samples", "samples seen", "{:,}"),
        ("loss", "loss", "{:.4f}"),
        *baselines,
        ("validation_loss", "validation loss", "{:.4f}"),
        *((tile.key, tile.title, tile.form) for tile in section.tiles),
        ("images_per_second", "images/s", "{:,.0f}"),
        ("data_wait", "data wait", "{:.1%}"),
        ("mfu", "MFU", "{:.1%}"),
        ("eta_seconds", "time left", None),
    ):
        if key in last:
            text = form.format(last[key]) if form else duration(last[key])
            tiles.append(f"<div><b>{text}</b>{title}</div>")
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _charts(lines: Lines, section: ReportSection) -> str:
    series = partial(_series, lines)
    probes = sorted({key for line in lines for key in line if key.startswith("probe_")})
    shown = [
        chart(
            "Loss",
            [
                series("loss", "training"),
                series("validation_loss", "validation", "dots"),
                *(
                    series(key, f"baseline: {name}", "baseline")
                    for key, name in section.baselines.items()
                ),
            ],
        ),
        *(
            chart(one.title, [series(key, name, "dots") for key, name in one.names.items()])
            for one in section.charts
        ),
        chart(
            "Frozen features, top-1 %",
            [one for number, key in enumerate(probes) for one in _probe(lines, key, number)],
        ),
        chart("Learning rate", [series("lr", "learning rate")], from_zero=True),
        chart("Gradient norm, before clipping", [series("grad_norm", "norm")], from_zero=True),
        chart("Images per second", [series("images_per_second", "all ranks")], from_zero=True),
        chart(
            "Time spent waiting for data, slowest rank",
            [series("data_wait", "data wait", factor=100)],
            unit=" %",
            from_zero=True,
        ),
        chart(
            f"Model FLOP utilisation, relative to {_peak(lines)}",
            [series("mfu", "MFU", factor=100)],
            unit=" %",
            from_zero=True,
        ),
        chart(
            "Memory, maximum over ranks",
            [
                series("device_memory_gib", "device peak"),
                series("host_memory_gib", "process"),
            ],
            unit=" GiB",
            from_zero=True,
        ),
    ]
    drawn = {key for one in section.charts for key in one.names}
    shown += _other_charts(lines, KNOWN | set(probes) | set(section.baselines) | drawn)
    return f'<section class="charts">{"".join(shown)}</section>'


def _other_charts(lines: Lines, drawn: set[str]) -> list[str]:
    """Return charts of the figures that have none of their own, by name."""
    keys = sorted(
        key
        for key in {key for line in lines for key in line} - drawn
        if all(isinstance(line.get(key, 0), int | float) for line in lines)
        # Counts that stay 0 are not drawn; a class IoU or an mAP of 0 is.
        and any(line.get(key, 0) or isinstance(line.get(key), float) for line in lines)
    )
    return [
        chart(key.replace("_", " "), [_series(lines, key, key)], from_zero=True) for key in keys
    ]


def _series(lines: Lines, key: str, name: str, kind: Any = "line", factor: float = 1.0) -> Series:
    points = [(line["step"], line[key] * factor) for line in lines if key in line]
    if key == "device_memory_gib" and not any(value for _, value in points):
        points = []  # training on a CPU
    return Series(name=name, points=points, kind=kind)


def _probe(lines: Lines, key: str, color: int) -> Iterator[Series]:
    """Yield the results of a probe, with the one at step 0 (random weights) as a baseline."""
    name = key.removeprefix("probe_").removesuffix("_top1")
    points = [(line["step"], line[key]) for line in lines if key in line]
    yield Series(name=name, points=points, kind="dots", color=color)
    first, start = points[0]
    if first == 0:
        across = [(0.0, start), (float(lines[-1]["step"]), start)]
        yield Series(name=f"{name}, random weights", points=across, kind="baseline", color=color)


def _peak(lines: Lines) -> str:
    sources = {line["mfu_peak"] for line in lines if "mfu_peak" in line}
    return "the data sheet" if sources == {"maker"} else "a measured matrix product"


def _pictures(run: RunFolder) -> str:
    files = sorted(run.reconstructions.glob("step-*.png"))
    if not files:
        return ""
    encoded = base64.b64encode(files[-1].read_bytes()).decode()
    return (
        f"<h2>Reconstructions, {escape(files[-1].stem)}</h2>"
        f'<img alt="reconstructions" src="data:image/png;base64,{encoded}">'
    )


def _text(title: str, path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"


def _description(run: RunFolder, section: ReportSection) -> str:
    """Return the task's sentence on the recipe; empty if there is none."""
    if section.describe is None:
        return ""
    try:
        text = section.describe(read_values(run.recipe))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # an edited recipe
        return ""
    return f"<p>{escape(text)}</p>"


def _environment(run: RunFolder) -> str:
    try:
        found = json.loads(run.environment.read_text(encoding="utf-8"))
        rows = [
            f"<tr><th>{escape(str(key).replace('_', ' '))}</th><td>{escape(str(value))}</td></tr>"
            for key, value in found.items()
        ]
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return f"<h2>Environment</h2><table>{''.join(rows)}</table>"


def _bad_samples(run: RunFolder) -> str:
    if not run.bad_samples.is_file():
        return ""
    count = len(run.bad_samples.read_bytes().splitlines())
    return f"<h2>Damaged samples</h2><p>{count:,} listed in {escape(run.bad_samples.name)}.</p>"
