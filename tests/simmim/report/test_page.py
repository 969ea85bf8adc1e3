"""The HTML report of a run, parsed as HTML and its charts as XML."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from simmim.cli import main
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.report.charts import POINTS, Series, chart, ticks
from simmim.report.page import write_report
from simmim.report.section import ReportSection, Tile
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.train import report_run

EMPTY = {"meta", "img"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that was not opened last; notes what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(run: RunFolder) -> str:
    text = run.report.read_text()
    reader = Balanced()
    reader.feed(text)
    assert reader.open == []
    assert all(place.startswith("data:") for place in reader.fetched)
    assert "@import" not in text
    assert "url(#" in text or "<svg" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return text


def titles(text: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", text)


def test_training_writes_a_report(
    pretrain_values: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    pretrain_values["probe"] = {"shards": str(shards), "every": 6}
    run = RunFolder(path=tmp_path / "run")
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    train(stage, run, build_accelerator("fp32"), None, write_report=report_run)
    text = read(run)
    assert titles(text) == [
        "Loss",
        "Frozen features, top-1 %",
        "Learning rate",
        "Gradient norm, before clipping",
        "Images per second",
        "Time spent waiting for data, slowest rank",
        "Model FLOP utilisation, relative to a measured matrix product",
        "Memory, maximum over ranks",
    ]
    parts = ("mean colour", "validation", "random weights", "data:image/png", "task: pretrain")
    for part in (*parts, "AvgDist"):
        assert part in text
    assert "accelerate" in text


def test_the_report_command_rewrites_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(path=tmp_path / "a <b> run")
    run.path.mkdir()
    lines = [
        {"step": step, "loss": 1 / step, "skipped_steps": step - 1, "never": 0}
        for step in range(1, 4)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert main(["report", str(run.path)]) == 0
    assert str(run.report) in capsys.readouterr().out
    text = read(run)
    assert "a &lt;b&gt; run" in text
    assert titles(text) == ["Loss", "skipped steps"]  # what has only been 0 is not drawn


def test_a_run_without_metrics_has_a_report(tmp_path: Path) -> None:
    RunFolder(path=tmp_path).recipe.touch()
    write_report(RunFolder(path=tmp_path))
    assert "Nothing has been logged yet" in read(RunFolder(path=tmp_path))


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main(["report", str(folder)]) == 2
        assert "not a run folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl cannot be read" in capsys.readouterr().err


def points_of(svg: str, kind: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf'<{kind} [^>]*points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]  # type: ignore[misc]


def test_a_long_line_is_thinned_and_its_range_shaded() -> None:
    values = [(float(step), 1.0 + (step % 100 == 7)) for step in range(10_000)]
    svg = chart("x", [Series(name="x", points=values)])
    assert len(points_of(svg, "polyline")) == POINTS
    shaded = points_of(svg, "polygon")
    assert len(shaded) == 2 * POINTS
    heights = {y for _, y in shaded}
    assert len(heights) == 2  # a spike is not averaged away


def test_nonfinite_values_are_left_out() -> None:
    values = [(0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)]
    assert len(points_of(chart("x", [Series(name="x", points=values)]), "polyline")) == 2
    assert chart("x", [Series(name="x", points=[(0.0, float("nan"))])]) == ""


def test_larger_values_are_higher_and_later_ones_further_right() -> None:
    svg = chart("x", [Series(name="x", points=[(0, 1.0), (10, 3.0), (20, 2.0)])])
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg, "polyline")
    assert x0 < x1 < x2
    assert y1 < y2 < y0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.68, 1.32, [0.8, 1.0, 1.2]), (5, 5, [5])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_figures_of_0_are_shown_and_counts_of_0_are_not(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    run.path.mkdir()
    figures = {"miou": 0.0, "iou/road": 0.0, "mask_map": 0.0, "mean_average_precision": 0.0}
    lines = [{"step": 2, "loss": 1.0, "skipped": 0}, {"step": 2} | figures]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiles = (Tile(key="miou", title="mIoU %"), Tile(key="mask_map", title="mask mAP %"))
    write_report(run, ReportSection(tiles=tiles))
    text = read(run)
    assert {"miou", "iou/road", "mask map", "mean average precision"} <= set(titles(text))
    assert "skipped" not in titles(text)
    assert "<b>0.00</b>mIoU %" in text
