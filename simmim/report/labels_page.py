"""HTML page on label efficiency: pretrained against random weights, by fraction of labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, stdev

from simmim.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, STYLE, TOP, WIDTH, ticks

METRICS = {
    "top1": "top-1 %",
    "mean_average_precision": "mAP %",
    "miou": "mIoU %",
    "mask_map": "mask mAP %",
    "box_map": "box mAP %",
}
"""Titles of the metrics."""
COLORS = {"pretrained": "#2563eb", "scratch": "#d97706"}


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """Scores over seeds from one initialisation with one fraction of the labels."""

    start: str
    """pretrained or scratch."""
    fraction: float
    """Fraction of the labels."""
    values: tuple[float, ...]
    """Percent, one per seed; at least one."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """Mean and standard deviation."""
        if self.spread is None:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {self.spread:.1f}"


def labels_page(
    title: str, scores: Sequence[LabelScores], metric: str, notes: Sequence[str]
) -> str:
    """Return the page as HTML.

    Args:
        title: title of the page.
        scores: scores of both initialisations, for the same fractions.
        metric: name of the metric, a key of `METRICS`.
        notes: paragraphs on what was trained.
    """
    header, *rows = table_of(scores, metric)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1>{paragraphs}<table><tr>{cells}</tr>{body}</table>"
        f"<figure><figcaption>{escape(METRICS.get(metric, metric))}, by fraction of labels"
        f"</figcaption>{scores_svg(scores)}</figure></body></html>\n"
    )


def table_of(scores: Sequence[LabelScores], metric: str) -> list[list[str]]:
    """Return the rows of the table: a header, then one per fraction of the labels."""
    name = METRICS.get(metric, metric)
    rows = [["labels", f"pretrained, {name}", f"scratch, {name}", "gain, points", "seeds"]]
    for fraction in sorted({one.fraction for one in scores}):
        found = {one.start: one for one in scores if one.fraction == fraction}
        pretrained, scratch = found.get("pretrained"), found.get("scratch")
        gain = (
            ""
            if pretrained is None or scratch is None
            else f"{gain_from_pretraining(scores, fraction):+.1f}"
        )
        texts = [one.text if one is not None else "" for one in (pretrained, scratch)]
        seeds = max(len(one.values) for one in found.values())
        rows.append([f"{100 * fraction:g} %", *texts, gain, str(seeds)])
    return rows


def gain_from_pretraining(scores: Sequence[LabelScores], fraction: float) -> float:
    """Return the gain from pretraining with a fraction of the labels, in percentage points."""
    found = {one.start: one.mean for one in scores if one.fraction == fraction}
    return found["pretrained"] - found["scratch"]


def scores_svg(scores: Sequence[LabelScores]) -> str:
    """Return a standalone SVG: means as lines, seeds as dots, standard deviations as bars.

    The axis of the fraction of labels is logarithmic.
    """
    fractions = sorted({one.fraction for one in scores})
    values = [value for one in scores for value in one.values]
    for one in scores:
        values += [one.mean - (one.spread or 0.0), one.mean + (one.spread or 0.0)]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 1.0
    axes = _Axes(low=low - room, high=high + room, first=fractions[0], last=fractions[-1])
    parts = [_grid(axes, fractions)]
    for number, (start, color) in enumerate(COLORS.items()):
        own = sorted((one for one in scores if one.start == start), key=lambda one: one.fraction)
        if own:
            parts += [_curve(own, color, axes), _name(start, color, number)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="#6b7280">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True, kw_only=True)
class _Axes:
    low: float
    high: float
    first: float
    last: float

    def x(self, fraction: float) -> float:
        span = math.log(self.last / self.first) or 1.0
        share = math.log(fraction / self.first) / span if self.last > self.first else 0.5
        return LEFT + 10 + share * (WIDTH - LEFT - RIGHT - 20)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _grid(axes: _Axes, fractions: Sequence[float]) -> str:
    parts = []
    for value in ticks(axes.low, axes.high):
        y = axes.y(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>'
            f'<text x="{LEFT - 6}" y="{y:.1f}" dy=".35em" text-anchor="end">{value:g}</text>'
        )
    parts += [
        f'<text x="{axes.x(fraction):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
        f"{100 * fraction:g} %</text>"
        for fraction in fractions
    ]
    return "".join(parts)


def _curve(own: Sequence[LabelScores], color: str, axes: _Axes) -> str:
    path = " ".join(f"{axes.x(one.fraction):.1f},{axes.y(one.mean):.1f}" for one in own)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>']
    for one in own:
        x = axes.x(one.fraction)
        parts += [
            f'<circle cx="{x:.1f}" cy="{axes.y(value):.1f}" r="2.5" fill="{color}"/>'
            for value in one.values
        ]
        if one.spread is not None:
            ends = (axes.y(one.mean - one.spread), axes.y(one.mean + one.spread))
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" '
                f'stroke="{color}" stroke-width="5" stroke-opacity=".25"/>'
            )
    return "".join(parts)


def _name(start: str, color: str, number: int) -> str:
    return (
        f'<text x="{LEFT + 14}" y="{TOP + 14 + 15 * number}" fill="{color}">{escape(start)}</text>'
    )
