"""How restarted ranks join, and how a rank ends: exit code, atexit, no finalisation of Python."""

import subprocess
import sys
from datetime import timedelta
from itertools import count

import pytest
import torch.distributed
from torch.distributed import TCPStore, distributed_c10d

from simmim.engine.distributed import launcher
from simmim.engine.distributed.launcher import join_group
from simmim.engine.exit_codes import LOST

TIMEOUT = timedelta(seconds=60)

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


@pytest.mark.parametrize("restarts", [0, 1, 2])
def test_each_restart_and_each_training_has_keys_of_its_own(
    restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_groups", count())
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": server.port,
        "RANK": 0,
        "WORLD_SIZE": 1,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": restarts,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    for training in (0, 1):
        join_group(TIMEOUT)
        assert torch.distributed.is_initialized() == (restarts + training > 0)
        if not restarts + training:
            continue  # accelerate initialises the first group
        try:
            distributed_c10d._get_default_store().set("key", "value")
            place = f"restart-{restarts}/training-{training}"
            groups = ("default_pg", "0/")  # names in versions of torch
            assert any(server.check([f"{place}/{group}/key"]) for group in groups)
        finally:
            torch.distributed.destroy_process_group()
