"""Run the cells in a process of their own, and start another where it ends before its time."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from simmim.bench.gpu.cells import Results
from simmim.environment import process_environment

WORKER = [sys.executable, "-m", "simmim.bench.gpu.worker"]
"""The process that runs the cells; arguments are the file of results and the deadline."""
LOOK_EVERY = 2.0
"""Seconds between looks for whether a cell takes too long."""
MOST_IN_VAIN = 2
"""Processes that may end in a row without the outcome of a cell."""
TIME_IS_UP = 69
"""Exit code of the process where cells are left for the next call."""
NO_DEVICE = 71
"""Exit code of the process where there is no GPU; what it wrote says so."""


def run_plan(results: Results, *, deadline: float) -> bool:
    """Run the cells that are not done, until a time (of `time.time`).

    Returns:
        Whether all are done.

    Raises:
        ValueError: the process that runs them ends before it begins one.
    """
    in_vain = 0
    while time.time() < deadline:
        done = results.count_done()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            code = _run_worker(results, deadline, output)
            results = Results.load(results.path)
            if code in (0, TIME_IS_UP):
                return code == 0
            if code == NO_DEVICE:
                raise ValueError(_last_lines(output))
            cell = results.running
            if cell is not None and time.time() >= deadline:
                results.postpone(cell)
            elif cell is not None:
                message = _why(code, results.cells[cell], _last_lines(output))
                results.finish(cell, "failed", message=message)
            in_vain = in_vain + 1 if results.count_done() == done else 0
            if in_vain >= MOST_IN_VAIN:
                raise ValueError(f"the process that runs the cells failed:\n{_last_lines(output)}")
    return False


def _run_worker(results: Results, deadline: float, output: Any) -> int:
    """Run a worker to its end, or to that of its time or of its cell's; return its exit code."""
    path = results.path
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if results.document["settings"]["dry run"] else {}
    process = subprocess.Popen(
        [*WORKER, str(path), str(deadline)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(process_environment().variables)
        | hidden
        | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        while True:
            try:
                return process.wait(max(0.0, min(LOOK_EVERY, deadline - time.time())))
            except subprocess.TimeoutExpired:
                if time.time() >= deadline or _takes_too_long(path):
                    return -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()


def _takes_too_long(path: Path) -> bool:
    results = Results.load(path)
    if results.running is None:
        return False
    cell = results.cells[results.running]
    return bool(time.time() > cell["began"] + cell["limit"])


def _why(code: int, cell: dict[str, Any], output: str) -> str:
    if time.time() > cell["began"] + cell["limit"]:
        return f"took more than {cell['limit']:.0f} s"
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the process ended with {ending}: {output}"


def _last_lines(output: Any, number: int = 8) -> str:
    output.seek(0)
    return "\n".join(output.read().strip().splitlines()[-number:])
