"""Simulated steps are computed once for all tests, in processes whose imports are done."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pytest

from simmim.bench import memory
from simmim.bench.step import Peak, Simulation, StepCase
from tests.simmim.forked import finish

Cases = Sequence[StepCase]

SIMULATE = """
import io, sys
from simmim.bench.step import main
sys.stdin = io.StringIO(sys.argv[1])
main(["simulate"])
"""


@pytest.fixture(scope="session")
def answers() -> dict[tuple[StepCase, ...], list[Simulation]]:
    return {}


@pytest.fixture(autouse=True)
def simulate_once(
    answers: dict[tuple[StepCase, ...], list[Simulation]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def remembered(action: Literal["simulate"], cases: Cases) -> Iterator[Simulation]:
        assert action == "simulate"
        key = tuple(cases)
        if key not in answers:
            given = json.dumps([asdict(case) for case in cases])
            text = finish(["-c", SIMULATE, given], tmp_path / "simulation.log")
            found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
            answers[key] = [
                Simulation(peaks=tuple(Peak(**peak) for peak in one["peaks"])) for one in found
            ]
        return iter(answers[key])

    monkeypatch.setattr(memory, "run_cases", remembered)
