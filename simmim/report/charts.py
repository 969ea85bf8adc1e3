"""Line charts as SVG text, without plotting libraries or network.

A report is one small file that follows the width and the colours of its reader's screen: plotly
adds megabytes of script to it, and matplotlib draws pictures of one size and colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Literal

import numpy as np

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 30
DOT = 2.5
POINTS = 400
"""Maximum number of points of a line; beyond it, neighbours are averaged and their range shaded."""
ROBUST_FROM = 50
"""From this number of points on, the axis excludes the most extreme half percent at each end."""
TICKS = 5

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #6b7280; --line: #e5e7eb;
  --paper: #fff; --card: #fafafa; --c0: #2563eb; --c1: #d97706; --c2: #6b7280; --c3: #059669; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --faint: #9ca3af; --line: #343a44;
  --paper: #15181d; --card: #1c2027; --c0: #60a5fa; --c1: #fbbf24; --c2: #9ca3af; --c3: #34d399; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; padding: 24px; max-width: 1180px; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2, summary { font-size: 18px; font-weight: 700; margin: 32px 0 8px; }
summary { cursor: pointer; }
.when { color: var(--faint); margin: 0 0 16px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 16px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; color: var(--faint); font-size: 13px; }
.tiles b { display: block; color: var(--ink); font-size: 18px; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr));
  gap: 16px; }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--faint); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; }
.s0 { --own: var(--c0); } .s1 { --own: var(--c1); }
.s2 { --own: var(--c2); } .s3 { --own: var(--c3); }
.line { fill: none; stroke: var(--own); stroke-width: 1.6; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 5 4; }
.band { fill: var(--own); opacity: .18; } .dot { fill: var(--own); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--faint); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 14px; border-top: 2px solid var(--own);
  vertical-align: middle; margin-right: 5px; }
.legend .dashed i { border-top-style: dashed; }
img { max-width: 100%; border-radius: 8px; background: #fff; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto; font-size: 13px; line-height: 1.4; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 3px 18px 3px 0;
  vertical-align: top; font-weight: 400; } th { color: var(--faint); white-space: nowrap; }
td { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(step, value) by rising step; non-finite values are left out."""
    kind: Literal["line", "dots", "baseline"] = "line"
    """`dots` marks each point, `baseline` is dashed."""
    color: int | None = None
    """Index of its colour; None for its position in the chart."""


def chart(title: str, series: Sequence[Series], *, unit: str = "", from_zero: bool = False) -> str:
    """Return a chart as an HTML figure; an empty string if no series has points.

    Args:
        title: title above the chart.
        series: series in the order of their colours.
        unit: unit of the last values in the legend.
        from_zero: whether the axis begins at 0.
    """
    colored = (
        replace(one, color=number if one.color is None else one.color)
        for number, one in enumerate(series)
    )
    drawn = [one for one in map(_finite, colored) if one.points]
    if not drawn:
        return ""
    frame = _frame(drawn, from_zero=from_zero)
    body = [_axes(frame), *(_line(one, frame) for one in drawn)]
    clip = f"c{abs(hash((title, len(drawn)))) % 10**8}"
    legend = "".join(
        f'<span class="s{one.color}{" dashed" if one.kind == "baseline" else ""}"><i></i>'
        f"{escape(one.name)} <b>{_number(one.points[-1][1])}{escape(unit)}</b></span>"
        for one in drawn
    )
    area = f'<rect x="{LEFT - DOT}" y="{TOP - DOT}" width="{WIDTH - LEFT - RIGHT + 2 * DOT}" '
    area += f'height="{HEIGHT - TOP - BOTTOM + 2 * DOT}"/>'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<clipPath id="{clip}">{area}</clipPath>{body[0]}'
        f'<g clip-path="url(#{clip})">{"".join(body[1:])}</g></svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Ranges of both axes."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> str:
        share = (step - self.first) / max(self.last - self.first, 1e-300)
        return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        share = (value - self.low) / max(self.high - self.low, 1e-300)
        # Far outside the clipped area numbers need not be exact, only short.
        return f"{HEIGHT - BOTTOM - min(max(share, -1), 2) * (HEIGHT - TOP - BOTTOM):.1f}"


def _finite(series: Series) -> Series:
    points = [(step, value) for step, value in series.points if math.isfinite(value)]
    return replace(series, points=points)


def _frame(series: Sequence[Series], *, from_zero: bool) -> _Frame:
    steps = [step for one in series for step, _ in one.points]
    low, high = math.inf, -math.inf
    for one in series:
        values = np.array([value for _, value in one.points])
        ends = (0.5, 99.5) if len(values) >= ROBUST_FROM else (0.0, 100.0)
        least, most = np.percentile(values, ends).tolist()
        low, high = min(low, least), max(high, most)
    if from_zero:
        low = min(low, 0.0)
    room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    low = low if from_zero and low == 0 else low - room
    return _Frame(first=min(steps), last=max(steps), low=low, high=high + room)


def _axes(frame: _Frame) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in ticks(frame.low, frame.high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy=".35em" class="end">{_number(value)}</text>')
    for step in ticks(frame.first, frame.last):
        x = frame.x(step)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" class="middle">{_number(step)}</text>')
    return "".join(parts)


def _line(series: Series, frame: _Frame) -> str:
    points, band = _thinned(series.points)
    path = " ".join(f"{frame.x(step)},{frame.y(value)}" for step, value in points)
    parts = []
    if band:
        edge = [f"{frame.x(step)},{frame.y(high)}" for step, _, high in band]
        edge += [f"{frame.x(step)},{frame.y(low)}" for step, low, _ in reversed(band)]
        parts.append(f'<polygon class="band s{series.color}" points="{" ".join(edge)}"/>')
    kind = " dashed" if series.kind == "baseline" else ""
    parts.append(f'<polyline class="line s{series.color}{kind}" points="{path}"/>')
    if series.kind == "dots" or len(points) == 1:
        parts += [
            f'<circle class="dot s{series.color}" cx="{frame.x(step)}" cy="{frame.y(value)}" '
            f'r="{DOT}"><title>step {_number(step)}: {_number(value)}</title></circle>'
            for step, value in points
        ]
    return "".join(parts)


def _thinned(
    points: Sequence[tuple[float, float]],
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Return the means of at most POINTS groups of neighbours, and (step, min, max) of each."""
    if len(points) <= POINTS:
        return list(points), []
    edges = np.linspace(0, len(points), POINTS + 1).astype(int).tolist()
    groups = [np.array(points[first:end]) for first, end in pairwise(edges)]
    means = [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]
    means[-1] = (float(points[-1][0]), means[-1][1])
    band = [
        (step, float(group[:, 1].min()), float(group[:, 1].max()))
        for (step, _), group in zip(means, groups, strict=True)
    ]
    return means, band


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _number(value: float) -> str:
    """Return a number as short text."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size and size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"
