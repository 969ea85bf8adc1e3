"""Worker processes: results do not depend on their number, and failures are raised."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.executors.processes import LostWorkerError, WorkerError, map_tasks

# In a module of its own, since a worker must be able to import it.
MODULE = """
import os, signal

def square(task, tick):
    tick(1)
    if task == -1:
        raise ValueError("a mistake of the input")
    if task == -2:
        raise KeyError("a mistake of the program")
    if task == -3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task
"""


@pytest.fixture
def square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that squares its task, or fails in the way that a negative task asks for."""
    (tmp_path / "squaring_for_workers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("squaring_for_workers").square


def _run(square: Callable[..., Any], tasks: list[int], workers: int) -> tuple[list[int], int]:
    ticks: list[int] = []
    results = map_tasks(square, tasks, workers=workers, tick=ticks.append)
    return sorted(results), sum(ticks)


def test_results_and_ticks_do_not_depend_on_workers(square: Callable[..., Any]) -> None:
    expected = [number * number for number in range(20)]
    assert _run(square, list(range(20)), 1) == (expected, 20)
    assert _run(square, list(range(20)), 2) == (expected, 20)
    assert _run(square, [], 2) == ([], 0)


def test_tasks_wait_until_they_may_start(square: Callable[..., Any]) -> None:
    done: set[int] = set()
    began: list[int] = []

    def may_start(task: int) -> bool:
        is_next = {number * number for number in range(task)} == done
        began.extend([task] * is_next)
        return is_next  # none before all others are done

    for result in map_tasks(square, range(20), workers=2, tick=lambda _: None, may_start=may_start):
        done.add(result)
    assert began == list(range(20))
    assert done == {number * number for number in range(20)}


def test_failures_are_raised_in_the_parent(square: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="a mistake of the input"):
        _run(square, [1, 2, -1, 3], 2)
    with pytest.raises(WorkerError, match="KeyError: 'a mistake of the program'"):
        _run(square, [-2], 2)
    started = time.monotonic()
    with pytest.raises(LostWorkerError, match=r"killed.*fewer --workers"):
        _run(square, [1, -3, 2], 2)
    assert time.monotonic() - started < 60
