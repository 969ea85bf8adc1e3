"""Stopping on request."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from simmim.engine.signals import STOP_SIGNALS, StopRequest

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


def test_terminals_launchers_and_slurm_ask_to_stop() -> None:
    assert set(STOP_SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@EACH
def test_a_signal_is_noted_and_not_obeyed(number: signal.Signals, no_harm: list[int]) -> None:
    with StopRequest() as stop:
        assert not stop.wanted
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.wanted
        assert stop.received == number
        os.kill(os.getpid(), number)  # launcher and terminal both deliver it
        assert stop.wanted
    assert no_harm == []


@EACH
def test_the_earlier_handlers_come_back(number: signal.Signals, no_harm: list[int]) -> None:
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
def test_ignored_signals_are_noted_and_ignored_again(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)  # as a shell starts background jobs
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.wanted
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_request_starts_unasked(no_harm: list[int]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted
    with StopRequest() as again:
        assert not again.wanted


def test_outside_the_main_thread_handlers_stay() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend(signal.getsignal(number) for number in STOP_SIGNALS)
            seen.append(stop.wanted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=20)
    assert seen == [*before, False]
