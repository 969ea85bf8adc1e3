"""Interrupts turned into an exception that nothing swallows, so that what is half done is cleared.

Python drops an exception that is raised while a finalizer runs. A signal may come at any moment, so
what was received is noted, and raised again at the next tick.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from data_prep.executors.processes import Tick


class InterruptedBySignal(KeyboardInterrupt):
    """SIGINT or SIGTERM was received."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruption:
    """The signal that was received, if any."""

    def __init__(self) -> None:
        self._number: int | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Raise the first signal; those that come while work is cleared away change nothing."""
        if self._number is None:
            self._number = number
            raise InterruptedBySignal(number)

    def watch(self, tick: Tick) -> Tick:
        """Return a tick that raises again what was received before."""

        def watched(samples: int) -> None:
            if self._number is not None:
                raise InterruptedBySignal(self._number)
            tick(samples)

        return watched


@contextmanager
def raise_on_signals() -> Iterator[Interruption]:
    """Raise `InterruptedBySignal` on SIGINT and SIGTERM, in the main thread."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, InterruptedBySignal):
            hook(unraisable)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, interruption.receive) for each in signals}
    hook, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield interruption
    finally:
        sys.unraisablehook = hook
        for each, handler in before.items():
            signal.signal(each, handler)
