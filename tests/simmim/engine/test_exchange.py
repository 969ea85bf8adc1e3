"""What ranks tell each other. Run as a script, this file is two ranks of which one has news."""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from simmim.engine.exchange import Exchange, StepFlags
from simmim.engine.signals import StopRequest


def test_a_single_process_hears_itself() -> None:
    exchange = Exchange()
    for own in (StepFlags(), StepFlags(stop=True), StepFlags(writing=True, failed=True)):
        assert exchange.any_rank(own) == own


def ask_as_rank(rank: int, store: str) -> None:
    """Ask together; rank 1 gets a signal after the first time, rank 0 writes and fails later."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    exchange = Exchange()
    with StopRequest() as stop:
        assert exchange.any_rank(StepFlags(stop=stop.wanted)) == StepFlags()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2):
            assert exchange.any_rank(StepFlags(stop=stop.wanted)) == StepFlags(stop=True)
        assert stop.received == (signal.SIGTERM if rank == 1 else None)
    assert exchange.any_rank(StepFlags(writing=rank == 0)) == StepFlags(writing=True)
    assert exchange.any_rank(StepFlags(failed=rank == 0)) == StepFlags(failed=True)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="starts ranks by fork")
def test_all_ranks_learn_what_one_says_in_the_same_step(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "store")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=100)[0].decode()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    assert process.returncode == 0, output


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=ask_as_rank, args=(rank, sys.argv[1])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    sys.exit(any(process.exitcode != 0 for process in ranks))
