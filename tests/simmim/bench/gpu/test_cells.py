"""Cells are run in order, recorded at once, and never lost to a failure or a crash."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from simmim.bench.gpu import command
from simmim.bench.gpu.cells import ATTEMPTS, Cell, CheckFailed, Results, Skipped, Values, run_cells
from simmim.bench.gpu.cli import main
from simmim.bench.gpu.report import write_report

FOREVER = float("inf")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.begin(tmp_path / "results.json", {"dry run": True, "command": "a command"})


def raising(error: Exception) -> Any:
    def run() -> Values:
        raise error

    return run


def test_a_failing_cell_is_recorded_and_the_others_run(results: Results) -> None:
    cells = [
        Cell(name="selftest/good", run=lambda: {"error": 0.25}),
        Cell(name="selftest/wrong", run=raising(CheckFailed("far | off", {"error": 9.0}))),
        Cell(name="selftest/broken", run=raising(RuntimeError("no kernel image\nsecond line"))),
        Cell(name="selftest/absent", run=raising(Skipped("timm is missing"))),
        Cell(name="selftest/last", run=dict),
    ]
    assert run_cells(cells, results, deadline=FOREVER)
    cells_found = Results.load(results.path).cells
    assert [one["status"] for one in cells_found.values()] == [
        "passed",
        "failed",
        "failed",
        "skipped",
        "passed",
    ]
    assert cells_found["selftest/wrong"]["values"] == {"error": 9.0}
    assert cells_found["selftest/wrong"]["message"] == "far | off"
    assert (
        "RuntimeError: no kernel image\nsecond line (in test_cells.py"
        in (cells_found["selftest/broken"]["message"])
    )
    report = write_report(results.document)
    assert "| selftest/wrong | failed | far / off |" in report
    assert "| wrong | failed | error 9 |" in report
    assert "| selftest/absent | skipped | timm is missing |" in report
    assert "RuntimeError: no kernel image second line" in report


def test_nothing_that_is_done_is_repeated(results: Results) -> None:
    ran: list[str] = []

    def cell(name: str) -> Cell:
        return Cell(name=name, run=lambda: ran.append(name) or {})  # type: ignore[func-returns-value]

    run_cells([cell("a"), cell("b")], results, deadline=FOREVER)
    again = Results.load(results.path)
    assert again.start(cell("c"))  # and the process is killed here
    assert Results.load(results.path).running == "c"
    run_cells([cell("a"), cell("b"), cell("c"), cell("d")], again, deadline=FOREVER)
    assert ran == ["a", "b", "c", "d"]
    run_cells([cell("e")], again, deadline=time.time())
    assert "e" not in again.cells


def test_a_cell_in_which_the_command_always_ends_is_given_up(results: Results) -> None:
    fatal = Cell(name="fatal", run=dict)
    for _ in range(ATTEMPTS):
        assert Results.load(results.path).start(fatal)
    last = Results.load(results.path)
    run_cells([fatal, Cell(name="next", run=dict)], last, deadline=FOREVER)
    assert last.cells["fatal"]["status"] == "failed"
    assert last.cells["next"]["status"] == "passed"


def test_after_a_spoiled_device_no_more_cells_run(results: Results) -> None:
    cells = [Cell(name="a", run=raising(RuntimeError("illegal access"))), Cell(name="b", run=dict)]
    assert not run_cells(cells, results, deadline=FOREVER, is_usable=lambda: False)
    assert list(results.cells) == ["a"]


WORKER = """
import os, signal, sys, time
from pathlib import Path
from simmim.bench.gpu.cells import Cell, Results, run_cells

def crash():
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

cells = [
    Cell(name="first", run=dict),
    Cell(name="crash", run=crash),
    Cell(name="hang", run=lambda: time.sleep(60), limit=0.2),
    Cell(name="last", run=dict),
]
run_cells(cells, Results.load(Path(sys.argv[1])), deadline=float(sys.argv[2]))
"""


def test_crashes_and_hangs_cost_one_cell(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(command, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    monkeypatch.setattr(command, "LOOK_EVERY", 0.1)
    assert command.run_plan(results, deadline=time.time() + 60)
    found = Results.load(results.path).cells
    assert {name: one["status"] for name, one in found.items()} == {
        "first": "passed",
        "crash": "failed",
        "hang": "failed",
        "last": "passed",
    }
    assert found["crash"]["message"] == "the process ended with signal 11: the last words"
    assert found["hang"]["message"] == "took more than 0 s"


def test_a_cell_that_time_runs_out_for_is_left_to_the_next_call(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WORKER.replace("limit=0.2", "").replace("crash)", "dict)"))
    monkeypatch.setattr(command, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    assert not command.run_plan(results, deadline=time.time() + 3)
    found = Results.load(results.path)
    assert found.running is None
    assert set(found.cells) <= {"first", "crash"}


def test_a_worker_that_cannot_start_is_explained(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text("import nothing_of_this_name")
    monkeypatch.setattr(command, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    with pytest.raises(ValueError, match="No module named 'nothing_of_this_name'"):
        command.run_plan(results, deadline=time.time() + 60)


def test_mistakes_are_explained(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", "--output", str(tmp_path)]) == 2
    assert f"add --continue {results.path}" in capsys.readouterr().err
    assert main(["--continue", str(results.path)]) == 2
    assert "was begun with --dry-run" in capsys.readouterr().err
    other = tmp_path / "other.json"
    for content in ([1], {"format": 1, "settings": {}}):
        other.write_text(json.dumps(content))
        assert main(["--continue", str(other)]) == 2
        assert "is not a file of results of simmim bench gpu" in capsys.readouterr().err
