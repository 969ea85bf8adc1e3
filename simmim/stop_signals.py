"""Signals that ask a training to stop, before it handles them itself and in its launchers."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Literal

# ruff: noqa: PLC0415 (signals have to be handled before anything is imported)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop: from a terminal, a launcher, a dropped connection, or from Slurm
before the time limit."""

PATIENCE = 60.0
"""Seconds that child processes have to end before training has begun."""

ProcessExit = Literal["no", "if stopped", "always"]
"""Whether the process exits after its training, so that further stop signals are ignored: never,
only if training has stopped on request, or also once it has reached its last step."""

Handler = Callable[[int, FrameType | None], Any]


def handled_stop_signals() -> tuple[signal.Signals, ...]:
    """Return the stop signals that may be handled: all, without SIGHUP under nohup."""
    return tuple(
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def exit_on_stop_signals(code: int) -> None:
    """Exit at once with this code on a stop signal, until training handles them itself.

    Nothing has been trained then, so there is nothing to save: an exception would have to pass
    through the imports of other libraries, some of which swallow it. Signals that were blocked
    while this process was started are received now.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        text = f"simmim: {name} outside of training, so there is nothing to save: stopped.\n"
        with suppress(OSError):
            os.write(2, text.encode())  # the signal may have interrupted a write to sys.stderr
        end_children()
        os._exit(code)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in handled_stop_signals():
        signal.signal(number, stop)
    import psutil  # noqa: F401 (`stop` would find it half imported)

    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ignore_stop_signals() -> None:
    """Ignore stop signals from now on: nothing is left to stop, only the process to end.

    Python restores their default actions before it has ended, and these would change its exit code.
    """
    for number in handled_stop_signals():
        signal.signal(number, signal.SIG_IGN)


def end_children() -> None:
    """Send SIGTERM to the child processes and wait until they have ended."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.terminate()
    psutil.wait_procs(children, timeout=PATIENCE)


class StopRelay:
    """Context that passes SIGTERM on to the child processes on any stop signal.

    Args:
        without_children: called on a stop signal if nothing was started yet.
    """

    def __init__(self, without_children: Callable[[], Any] = lambda: None) -> None:
        self.asked = False
        """Whether a stop signal was received."""
        self._without_children = without_children
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRelay":
        if threading.current_thread() is threading.main_thread():
            for number in handled_stop_signals():
                self._before[number] = signal.signal(number, self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Pass SIGTERM on."""
        import psutil

        self.asked = True
        children = psutil.Process().children()
        if not children:
            self._without_children()
        for child in children:
            child.terminate()
