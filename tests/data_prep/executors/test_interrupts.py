"""Signals end the work even if Python swallows the exception."""

import os
import signal
import threading

import pytest

from data_prep.executors.processes import InterruptedBySignal, raise_on_signals


class _Interrupted:
    """An object in whose finalizer a signal arrives."""

    finalized = 0

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            pass  # handlers run between bytecodes
        _Interrupted.finalized += 1


def test_a_signal_that_a_finalizer_swallows_is_raised_at_the_next_tick(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ticks: list[int] = []
    with raise_on_signals() as interruption:
        tick = interruption.watch(ticks.append)
        tick(1)
        _Interrupted()
        assert _Interrupted.finalized == 0  # the exception was raised inside, and dropped
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        with pytest.raises(InterruptedBySignal) as raised:
            tick(1)
    assert raised.value.number == signal.SIGTERM
    assert ticks == [1]
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_is_raised_at_once() -> None:
    steps = []

    def work() -> None:
        with raise_on_signals():
            steps.append("before")
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("after")

    with pytest.raises(InterruptedBySignal) as raised:
        work()
    assert raised.value.number == signal.SIGINT
    assert steps == ["before"]


def test_other_threads_leave_signals_alone() -> None:
    handlers = []

    def look() -> None:
        with raise_on_signals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [before]
