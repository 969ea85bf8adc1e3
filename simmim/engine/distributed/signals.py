"""Stopping on request: a signal to any rank ends training with a checkpoint, on all at once."""

import signal
import threading
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed

from simmim.data.loader.workers import STOP_SIGNALS


class StopRequest:
    """Within this context the signals are noted instead of obeyed.

    A launcher and the terminal may both deliver the same signal, so every further one is noted
    too. `agreed` asks all ranks, so that none waits for one that has already stopped. Where the
    process ends with what was stopped, those that still come on its way out are ignored.

    Args:
        timeout: the longest that asking waits for another rank; None is torch's own.
    """

    ends_process = False
    """Whether a stop is the end of this process, as it is of the command line's."""

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self.heeded = False
        """Whether what runs in this context has been stopped on request."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._group: torch.distributed.ProcessGroup | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Its own group on the CPU: asking never waits for the accelerator.
            self._group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            if self.heeded and self.ends_process:
                signal.signal(number, signal.SIG_IGN)
            else:
                # None: installed by other code than Python's, which cannot be named here.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Tell whether any rank was asked to stop; all ranks must call it together."""
        return bool(self.agree([self.wanted])[0])

    @property
    def wanted(self) -> int:
        """Return 1 if this rank was asked to stop, else 0."""
        return int(self.received is not None)

    def agree(self, signs: Sequence[int]) -> list[int]:
        """Return the largest of each sign over all ranks; all must call it together.

        Once a step this is where ranks learn of each other: of stops, writes and failures.
        """
        if self._group is None:
            return list(signs)
        largest = torch.tensor(signs)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self._group)
        agreed: list[int] = largest.tolist()
        return agreed
