"""How a rank ends: exit code, atexit functions, and no finalisation of Python."""

import subprocess
import sys

import pytest

from simmim.engine.exit_codes import LOST

ENDING = """
import atexit, ctypes
from simmim.engine.distributed.launcher import run_as_rank

class Finalised:
    def __del__(self):
        print("Python was finalised")

finalised = Finalised()
atexit.register(lambda: print("registered function"))

def program():
    print("done")
    {end}

run_as_rank(program)
"""


def ending(end: str) -> subprocess.CompletedProcess[str]:
    """Run a rank that ends by this statement."""
    program = ENDING.format(end=end)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("end", "code", "printed"),
    [
        ("return 0", 0, ["done", "registered function"]),
        ("return 75", 75, ["done", "registered function"]),
        (f"return {LOST}", LOST, ["done"]),
        ("raise ValueError('of its own')", 1, ["done", "registered function"]),
    ],
)
def test_a_rank_exits_without_finalising_python(end: str, code: int, printed: list[str]) -> None:
    done = ending(end)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == printed
    assert ("ValueError: of its own" in done.stderr) == ("raise" in end)


def test_a_crashing_rank_prints_its_stack() -> None:
    done = ending("ctypes.string_at(0)")
    assert done.returncode < 0
    assert "in program" in done.stderr
