"""Trainings that the benchmark starts end, whatever they write."""

import sys
from pathlib import Path

import pytest

from simmim.bench.gpu import training
from simmim.bench.gpu.cells import CheckFailed
from simmim.bench.gpu.scale import DRY

TALKATIVE = """
import sys
from pathlib import Path

sys.stderr.write("a warning\\n" * 100_000)  # more than a pipe holds
Path(sys.argv[1], "checkpoints", "step-00000001").mkdir(parents=True)
sys.exit("the last words")
"""


def test_a_training_that_writes_many_warnings_is_not_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PATIENCE", 20.0)
    command = [sys.executable, "-c", TALKATIVE, str(tmp_path)]
    with training.started(command, DRY) as talkative:
        training.wait_for_checkpoint(talkative, tmp_path)
        with pytest.raises(CheckFailed, match=r"exit code 1: a warning\n(.*\n)+the last words"):
            talkative.finish()
