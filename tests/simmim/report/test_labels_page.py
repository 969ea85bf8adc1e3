"""Table and plot of label efficiency."""

import xml.etree.ElementTree as ET

import pytest

from simmim.report.labels_page import (
    LabelScores,
    gain_from_pretraining,
    labels_page,
    scores_svg,
    table_of,
)

SCORES = [
    LabelScores(start="pretrained", fraction=0.01, values=(40.0, 42.0, 44.0)),
    LabelScores(start="scratch", fraction=0.01, values=(30.0, 30.0, 33.0)),
    LabelScores(start="pretrained", fraction=1.0, values=(90.0,)),
    LabelScores(start="scratch", fraction=1.0, values=(85.5,)),
]
SVG = "{http://www.w3.org/2000/svg}"


def test_mean_spread_and_gain() -> None:
    assert SCORES[0].mean == 42
    assert SCORES[0].spread == pytest.approx(2)
    assert SCORES[2].spread is None
    assert gain_from_pretraining(SCORES, 0.01) == pytest.approx(11)
    assert table_of(SCORES, "top1")[1:] == [
        ["1 %", "42.0 ± 2.0", "31.0 ± 1.7", "+11.0", "3"],
        ["100 %", "90.0", "85.5", "+4.5", "1"],
    ]


def test_one_initialisation_alone_has_no_gain() -> None:
    assert table_of(SCORES[:1], "top1")[1] == ["1 %", "42.0 ± 2.0", "", "", "3"]
    assert ET.fromstring(scores_svg(SCORES[:1])) is not None


def test_the_drawing_has_a_dot_per_seed() -> None:
    root = ET.fromstring(scores_svg(SCORES))
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter(f"{SVG}circle")]
    values = [value for one in SCORES for value in one.values]
    assert len(dots) == len(values)
    by_height = sorted(values, reverse=True)
    drawn = sorted(dots, key=lambda dot: dot[1])
    highest, lowest = drawn[0][1], drawn[-1][1]
    for value, (_, y) in zip(by_height, drawn, strict=True):
        share = (value - min(values)) / (max(values) - min(values))
        assert y == pytest.approx(lowest + share * (highest - lowest), abs=0.2)
    assert len({x for x, _ in dots}) == 2
    assert len(list(root.iter(f"{SVG}polyline"))) == 2


def test_deviations_larger_than_the_range_of_the_seeds_are_inside_the_drawing() -> None:
    scores = [LabelScores(start="pretrained", fraction=1.0, values=(50.0, 66.7))]
    root = ET.fromstring(scores_svg(scores))
    (bar,) = [one for one in root.iter(f"{SVG}line") if "stroke-opacity" in one.attrib]
    _, _, _, height = map(float, root.attrib["viewBox"].split())
    heights = sorted(float(bar.attrib[end]) for end in ("y1", "y2"))
    assert 0 < heights[0] < heights[1] < height


def test_the_page_is_self_contained() -> None:
    page = labels_page("Labels & more", SCORES, "miou", ["what was <trained>"])
    assert "Labels &amp; more" in page
    assert "&lt;trained&gt;" in page
    assert "+11.0" in page
    assert "src=" not in page
