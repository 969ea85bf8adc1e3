"""Stop requests. Run as a script, this file is two ranks of which one gets a signal."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simmim.engine.distributed.signals import StopRequest, _Arrivals
from simmim.engine.exit_codes import LOST
from simmim.stop_signals import STOP_SIGNALS
from tests.simmim.forked import finish, waiting_ranks

EACH = pytest.mark.parametrize("number", STOP_SIGNALS)


@pytest.fixture(autouse=True)
def no_harm() -> Iterator[list[int]]:
    """Handlers that only count, so that a failing test does not end the test run."""
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in STOP_SIGNALS
    }
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def test_stop_signals_include_those_of_terminals_launchers_and_slurm() -> None:
    assert set(STOP_SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


@EACH
def test_a_signal_is_recorded_instead_of_obeyed(number: signal.Signals, no_harm: list[int]) -> None:
    with StopRequest() as stop:
        assert not any(stop.agree([stop.wanted]))
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert any(stop.agree([stop.wanted]))
        assert stop.received == number
        os.kill(os.getpid(), number)  # launcher and terminal both deliver it
        assert any(stop.agree([stop.wanted]))
    assert no_harm == []


def test_a_flood_of_signals_is_recorded() -> None:
    with StopRequest() as stop:
        flood = subprocess.Popen(["sh", "-c", f"while kill -USR1 {os.getpid()}; do :; done"])
        try:
            began = time.monotonic()
            while time.monotonic() < began + 1.5:  # signals interrupt the handling of others
                pass
        finally:
            flood.kill()
            flood.wait()
        assert stop.received == signal.SIGUSR1


@EACH
def test_previous_handlers_are_restored(number: signal.Signals, no_harm: list[int]) -> None:
    before = signal.getsignal(number)
    with StopRequest():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before
    with pytest.raises(RuntimeError, match="in training"), StopRequest():
        raise RuntimeError("in training")
    assert signal.getsignal(number) == before
    os.kill(os.getpid(), number)
    assert no_harm == [number]


@EACH
def test_after_a_stop_that_ends_the_process_signals_are_ignored(
    number: signal.Signals, no_harm: list[int]
) -> None:
    with StopRequest(process_exit="if stopped"):
        pass
    os.kill(os.getpid(), number)
    assert no_harm == [number]  # nothing was stopped
    with StopRequest(process_exit="if stopped") as stop:
        stop.honoured = True
    os.kill(os.getpid(), number)
    assert no_harm == [number]


@EACH
def test_after_a_finished_training_signals_are_ignored(
    number: signal.Signals, no_harm: list[int]
) -> None:
    with pytest.raises(KeyError), StopRequest(process_exit="always"):
        raise KeyError
    os.kill(os.getpid(), number)
    assert no_harm == [number]  # nothing was finished
    with StopRequest(process_exit="always"):
        pass
    os.kill(os.getpid(), number)
    assert no_harm == [number]


@EACH
def test_how_one_training_ends_its_process_is_not_known_to_the_next(
    number: signal.Signals, no_harm: list[int]
) -> None:
    before = signal.getsignal(number)
    with StopRequest(process_exit="always") as stop:
        stop.honoured = True
    signal.signal(number, before)
    with StopRequest() as stop:
        stop.honoured = True
    os.kill(os.getpid(), number)
    assert no_harm == [number]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_ignored_signals_are_recorded_and_ignored_again(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)  # as a shell starts background jobs
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert any(stop.agree([stop.wanted]))
    assert signal.getsignal(number) == signal.SIG_IGN


def test_under_nohup_a_dropped_connection_stops_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_request_starts_unasked(no_harm: list[int]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert any(stop.agree([stop.wanted]))
    with StopRequest() as again:
        assert not any(again.agree([again.wanted]))


def test_handlers_stay_outside_the_main_thread() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend(signal.getsignal(number) for number in STOP_SIGNALS)
            seen.append(any(stop.agree([stop.wanted])))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=20)
    assert seen == [*before, False]


def ask_as_rank(rank: int, store: str) -> None:
    """Ask together three times; rank 1 gets a signal after the first."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    answers = []
    with StopRequest() as stop:
        answers.append(any(stop.agree([stop.wanted])))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        answers += [any(stop.agree([stop.wanted])), any(stop.agree([stop.wanted]))]
        received = stop.received
        assert stop.agree([rank, 1 - rank, 0, 7 + rank]) == [1, 1, 0, 8]
    torch.distributed.destroy_process_group()
    assert answers == [False, True, True], answers
    assert received == (signal.SIGTERM if rank == 1 else None)


@pytest.mark.skipif(sys.platform != "linux", reason="starts ranks by fork")
def test_all_ranks_learn_of_a_signal_to_one_in_the_same_step(tmp_path: Path) -> None:
    finish([__file__, str(tmp_path / "store")], tmp_path / "log")


@pytest.mark.skipif(sys.platform != "linux", reason="starts ranks by fork")
def test_a_rank_that_waits_in_native_code_ends_on_a_signal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    guard = "StopRequest(timedelta(seconds=500), longest_wait=1.0)"
    with waiting_ranks(guard, log, late=0) as job:
        os.kill(job.pids[0], signal.SIGSTOP)
        os.kill(job.pids[1], signal.SIGTERM)
        assert job.code_of(1, timeout=60) == LOST, log.read_text()
    assert "SIGTERM arrived 1 s ago, and rank 1 still waits for the others" in log.read_text()


def test_what_signals_were_written_to_is_restored() -> None:
    """As asyncio sets it, on which notebooks run."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    seen: list[int] = []
    try:
        arrivals = _Arrivals(seen.append)
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        arrivals.close()
        assert seen == [signal.SIGUSR1]
        assert signal.set_wakeup_fd(before) == theirs.fileno()
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=ask_as_rank, args=(rank, sys.argv[1])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    sys.exit(any(process.exitcode != 0 for process in ranks))
