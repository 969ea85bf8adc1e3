"""Stopping on request: signals are noted, and end training with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from simmim.data.batches import STOP_SIGNALS


class StopRequest:
    """Within this context the signals are noted instead of obeyed.

    A launcher and the terminal may both deliver the same signal, so every further one is noted
    too. Only this process knows: `simmim.engine.exchange` tells the others.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None: installed by other code than Python's, which cannot be named here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    @property
    def wanted(self) -> bool:
        """Whether a signal came."""
        return self.received is not None
