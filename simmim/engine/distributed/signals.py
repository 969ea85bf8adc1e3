"""Stop requests: a signal to any rank stops training on all ranks, with a checkpoint."""

import signal
import threading
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed

from simmim.stop_signals import handled_stop_signals


class StopRequest:
    """Context in which stop signals are recorded instead of ending the process.

    A launcher and the terminal may both deliver the same signal, so repeated ones are only
    recorded, too. `agree` shares them with all ranks, so that none waits for a stopped one. If
    the process ends after training, further signals on the way out are ignored.

    Args:
        timeout: the longest wait for another rank in `agree`; None is torch's default.
    """

    ends_process = False
    """Whether the process ends once training has stopped on request, as a command's does."""
    ends_when_finished = False
    """Whether it also ends once training has reached its last step: nothing is left to stop."""

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self.honoured = False
        """Whether training has been stopped on request."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._group: torch.distributed.ProcessGroup | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in handled_stop_signals():
                self._before[number] = signal.signal(number, self._record)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # A group of its own on the CPU, so that agreeing never waits for the accelerator.
            self._group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        finished = error is None and not self.honoured
        ends = (self.honoured and self.ends_process) or (finished and self.ends_when_finished)
        for number, handler in self._before.items():
            if ends:
                signal.signal(number, signal.SIG_IGN)
            else:
                # None: a handler that was not installed from Python cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    @property
    def wanted(self) -> int:
        """1 if this rank was asked to stop, else 0."""
        return int(self.received is not None)

    def agree(self, flags: Sequence[int]) -> list[int]:
        """Return the maximum of each flag over all ranks, which must call this together.

        Ranks call it once per step to learn of stop requests and of finished or failed writes.
        """
        if self._group is None:
            return list(flags)
        largest = torch.tensor(flags)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self._group)
        agreed: list[int] = largest.tolist()
        return agreed
