"""Logs of a run that kills have cut short and people have edited."""

import json
from pathlib import Path

import pytest

from simmim.engine.metrics_file import keep_lines_up_to, read_lines
from simmim.engine.run import RunFolder
from simmim.report.page import write_report

GOOD = [
    {"step": 1, "loss": 0.5, "lr": 1e-3, "mfu_peak": "maker", "eta_seconds": 5},
    {"step": 1, "validation_loss": 0.25},
    {"step": 2, "loss": 0.125, "skipped": 0},
]
DAMAGED = [
    b"no json",
    b"\xff\xfe\x00binary\x80",
    b'{"step": 2, "loss": 0.5',
    b"[" * 100_000 + b"]" * 100_000,
    b'{"step": 2, "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"step": 1e308, "loss": 1}',
    b'{"step": ' + b"9" * 400 + b"}",
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": NaN, "loss": 1}',
    b'{"step": -1, "loss": 1}',
    b'{"step": true, "loss": 1}',
    b'{"step": "2", "loss": 1}',
    b'{"step": null, "loss": 1}',
    b'{"loss": 1}',
    b"[1, 2]",
    json.dumps({"step": 2} | {f"k{number}": 1 for number in range(20_000)}).encode(),
    b"7",
    b"null",
    b"",
]
ODD_FIGURES = [
    b'{"step": 2, "loss": "low"}',
    b'{"step": 2, "loss": NaN, "lr": Infinity}',
    b'{"step": 2, "loss": 1e308, "grad_norm": -1e308}',
    b'{"step": 2, "loss": {"of": 1}, "top1": [1], "samples": null, "epoch": true}',
    b'{"step": 2, "mfu_peak": 3, "eta_seconds": "soon", "own\\u001b[31m": 4}',
    b'{"step": 2, "loss": ' + b"8" * 400 + b"}",
]


def written(folder: Path, *more: bytes) -> RunFolder:
    """Return a run whose metrics are GOOD, with more lines among them."""
    lines = [json.dumps(line).encode() for line in GOOD]
    lines[1:1] = more
    run = RunFolder(path=folder)
    run.metrics.write_bytes(b"\n".join(lines) + b"\n")
    return run


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:20].decode("latin-1"))
def test_a_damaged_line_is_left_out(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path, line)
    assert run.read_metrics() == GOOD
    assert [one.step for one in read_lines(run.metrics)].count(None) == 1
    write_report(run)
    assert "1 line" in capsys.readouterr().err
    assert "0.125" in run.report.read_text()
    keep_lines_up_to(run.metrics, 1)
    assert "1 line" in capsys.readouterr().err
    assert run.metrics.read_bytes() == b"".join(json.dumps(x).encode() + b"\n" for x in GOOD[:2])


@pytest.mark.parametrize("line", ODD_FIGURES, ids=lambda line: line[:40].decode())
def test_figures_of_the_wrong_type_are_left_out(line: bytes, tmp_path: Path) -> None:
    run = written(tmp_path, line)
    assert [one for one in run.read_metrics() if one != {"step": 2}] == GOOD
    write_report(run)
    assert "0.125" in run.report.read_text()
    assert "\x1b" not in run.report.read_text()
    keep_lines_up_to(run.metrics, 2)
    assert line in run.metrics.read_bytes().split(b"\n")  # kept as it is


def test_what_follows_the_last_line_feed_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path)
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + b'{"step": 2, "lo')
    assert run.read_metrics() == GOOD
    keep_lines_up_to(run.metrics, 2)
    assert run.metrics.read_bytes() == whole
    assert capsys.readouterr().err == ""  # a kill leaves such a line, nobody has edited it


def test_anomalies_of_later_steps_are_removed_too(tmp_path: Path) -> None:
    path = tmp_path / "anomalies.jsonl"
    lines = [json.dumps({"step": step, "rank": 0, "what": "loss"}) + "\n" for step in (1, 2, 5)]
    path.write_text("".join(lines))
    keep_lines_up_to(path, 2)
    assert path.read_text() == "".join(lines[:2])
    keep_lines_up_to(path, 0)
    assert path.read_text() == ""
    keep_lines_up_to(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()
