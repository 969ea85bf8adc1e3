"""`simmim bench gpu --dry-run` walks through all of it on a CPU, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simmim.bench.gpu import selftest
from simmim.bench.gpu.cells import CheckFailed, Results
from simmim.bench.gpu.plan import make_plan
from simmim.bench.gpu.scale import DRY, FULL
from simmim.bench.gpu.training import check_lost_rank, check_ranks, measure_loader
from simmim.cli import main
from swinv2 import attention

ROOT = Path(__file__).parents[4]


def done_cells(path: Path) -> dict[str, Any]:
    cells = json.loads(path.read_text())["cells"] if path.is_file() else {}
    return {name: one for name, one in cells.items() if one["status"] != "running"}


def test_mistyped_options_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "gpu", "--dry-rn"])
    assert "unknown: --dry-rn. Did you mean --dry-run?" in capsys.readouterr().err


@pytest.mark.timeout(600)  # half a minute of processor time
def test_a_killed_dry_run_is_continued_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "simmim.bench.gpu", "--dry-run", "--output", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    while len(done_cells(file)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its worker ends, too
    before = done_cells(file)
    assert main(["bench", "gpu", "--dry-run", "--continue", str(file)]) == 0
    after = done_cells(file)
    assert {name: after[name] for name in before} == before
    plan = [cell.name for cell in make_plan(DRY, Results(file, {}))]
    assert list(after) == plan
    failed = {name: one for name, one in after.items() if one["status"] == "failed"}
    assert not failed
    skipped = {name for name, one in after.items() if one["status"] == "skipped"}
    assert not [name for name in skipped if not name.startswith(MAY_BE_SKIPPED)]
    shares = ("share of the measured peak", "share of the ceiling")
    for name in (
        "step/tiny 64/4 ours compiled",
        "step/tiny 64/4 ours eager",
        "attention/4 auto eager",
    ):
        assert all(after[name]["values"][share] > 0 for share in shares)
    report = (tmp_path / "report.md").read_text()
    assert "A dry run" in report
    assert f"{len(plan)} cells done: 0 failed" in capsys.readouterr().out


MAY_BE_SKIPPED = ("loader/training", "selftest/ranks", "selftest/lost rank", "step/tiny 64/4 timm")

ABSENT = ("annotated_types", "cyclopts", "pydantic", "simplejpeg", "webdataset")
WITHOUT = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Refuse())
"""
RUN_SOME = """
import json, sys
from pathlib import Path
from dataclasses import replace
import simmim.bench.gpu.__main__
import simmim.bench.gpu.worker
from simmim.bench.gpu.cells import Results, run_cells
from simmim.bench.gpu.plan import make_plan
from simmim.bench.gpu.scale import DRY

names = json.loads(sys.argv[2])
results = Results.begin(Path(sys.argv[1]), {})
cells = [cell for cell in make_plan(replace(DRY, ranks=2), results) if cell.name in names]
run_cells(cells, results, deadline=float("inf"))
"""
NEEDS_PIPELINE = [
    "selftest/kill and resume",
    "selftest/ranks",
    "selftest/lost rank",
    "loader/training",
]
NEEDS_NONE = [
    "machine/environment",
    "machine/matrix product",
    "machine/copy",
    "selftest/auto bf16 eager",
    "selftest/memory",
    "step/tiny 64/4 ours eager",
    "attention/4 auto eager",
]


def test_without_optional_packages_what_needs_them_is_skipped_by_name(tmp_path: Path) -> None:
    file, names = tmp_path / "results.json", json.dumps(NEEDS_PIPELINE + NEEDS_NONE)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + RUN_SOME, str(file), names],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = done_cells(file)
    assert len(found) == len(NEEDS_PIPELINE + NEEDS_NONE)
    for name, one in found.items():
        assert one["status"] == ("skipped" if name in NEEDS_PIPELINE else "passed"), (name, one)
        if name in NEEDS_PIPELINE:
            assert one["message"].endswith(f"missing here: {', '.join(ABSENT)}")


def test_cells_have_names_of_their_own() -> None:
    for scale in (FULL, DRY):
        names = [cell.name for cell in make_plan(scale, Results(Path(), {}))]
        assert len(set(names)) == len(names)
    full = [cell.name for cell in make_plan(FULL, Results(Path(), {}))]
    for path in ("auto", "explicit", "sdpa", "sequential"):
        for precision in ("bf16", "fp16", "fp32"):
            for mode in ("eager", "compiled"):
                assert f"selftest/{path} {precision} {mode}" in full


@pytest.mark.slow
def test_the_loader_is_measured() -> None:
    found = measure_loader(replace(DRY, loader_steps=4))
    assert found["images per second"] > 0
    assert 0 <= found["share of the time waiting for data"] <= 1


@pytest.mark.slow
def test_distributed_checks_pass_on_a_cpu() -> None:
    scale = replace(DRY, ranks=2)
    found = check_ranks(scale)
    assert max(found["DDP"], found["FSDP2"]) < 1e-5
    assert check_lost_rank(scale)["seconds"] < 60


def test_a_wrong_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.check_agreement(DRY, "sequential", "fp32", compiled=False)
    right = attention.sequential_attention
    monkeypatch.setattr(
        attention, "sequential_attention", lambda *args, **options: right(*args, **options).flip(2)
    )
    with pytest.raises(CheckFailed, match="whole features"):
        selftest.check_agreement(DRY, "sequential", "fp32", compiled=False)


def test_without_a_gpu_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "gpu", "--output", str(tmp_path)]) == 2
    assert "no CUDA device is found" in capsys.readouterr().err
