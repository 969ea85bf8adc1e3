"""Simulated steps are computed once for all tests: each takes a process of some seconds."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest

from simmim.bench import memory
from simmim.bench.step import StepCase

Cases = Sequence[StepCase]
Action = Literal["simulate", "measure"]


@pytest.fixture(scope="session")
def answers() -> dict[tuple[Action, tuple[StepCase, ...]], list[Any]]:
    return {}


@pytest.fixture(autouse=True)
def simulate_once(
    answers: dict[tuple[Action, tuple[StepCase, ...]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cases = memory.run_cases

    def remembered(action: Action, cases: Cases) -> Iterator[Any]:
        key = action, tuple(cases)
        if key not in answers:
            answers[key] = list(run_cases(action, cases))
        return iter(answers[key])

    monkeypatch.setattr(memory, "run_cases", remembered)
