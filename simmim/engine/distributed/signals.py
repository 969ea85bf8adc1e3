"""Stop requests: a signal to any rank stops training on all ranks, with a checkpoint."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed

from simmim.engine.exit_codes import LOST
from simmim.stop_signals import ProcessExit, handled_stop_signals

LONGEST_WAIT = 60.0
"""Seconds after a stop signal in which a rank may wait in native code, where Python's handlers do
not run. After that the other ranks are not expected to answer: one of them is hung or lost."""

POLL = 0.05
"""Seconds between two looks at whether a signal has been recorded."""


class StopRequest:
    """Context in which stop signals are recorded instead of ending the process.

    A launcher and the terminal may both deliver the same signal, so repeated ones are only
    recorded, too. `agree` shares them with all ranks, so that none waits for a stopped one.

    A rank that waits for another in native code cannot record a signal. A thread sees it arrive,
    and ends the process if it is not recorded in time.

    Args:
        timeout: the longest wait for another rank in `agree`; None is torch's default.
        process_exit: whether the process exits afterwards; then further signals on the way out are
            ignored.
        longest_wait: seconds after a signal until a rank that has not recorded it ends.
        end: ends this process with an exit code, whatever its main thread is waiting for.
    """

    def __init__(
        self,
        timeout: timedelta | None = None,
        *,
        process_exit: ProcessExit = "no",
        longest_wait: float = LONGEST_WAIT,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._timeout, self._process_exit = timeout, process_exit
        self._longest_wait, self._end = longest_wait, end
        self._ended = False
        self._arrivals: _Arrivals | None = None
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
            if self._before:
                self._arrivals = _Arrivals(self._expect_record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        if self._arrivals is not None:
            self._arrivals.close()
        exits = self._process_exit == "always" and error is None
        exits |= self._process_exit != "no" and self.honoured
        for number, handler in self._before.items():
            if exits:
                signal.signal(number, signal.SIG_IGN)
            else:
                # None: a handler that was not installed from Python cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        # A signal may interrupt this while it handles another: no lock may be taken, as those of
        # `threading.Event` are, and little may be done.
        if self.received is None:
            self.received = signal.Signals(number)

    def _expect_record(self, number: int) -> None:
        """End this process if the main thread does not record a stop signal in time."""
        if number not in self._before:
            return
        deadline = time.monotonic() + self._longest_wait
        while time.monotonic() < deadline:
            if self._ended or self.received is not None:
                return
            time.sleep(POLL)
        rank = torch.distributed.get_rank()
        sys.stderr.write(
            f"\nsimmim: {signal.Signals(number).name} arrived {self._longest_wait:.0f} s ago, and"
            f" rank {rank} still waits for the others, one of which must be hung or lost. It exits"
            f" with code {LOST} and without a checkpoint of its last steps; resume from the last"
            " one with --resume auto.\n"
        )
        sys.stderr.flush()
        self._end(LOST)

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


class _Arrivals:
    """A thread that is told of signals as they arrive, whatever the main thread is waiting for.

    Args:
        arrived: called in the thread with the number of each signal that Python handles.
    """

    def __init__(self, arrived: Callable[[int], None]) -> None:
        self._arrived = arrived
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # signal.set_wakeup_fd requires it
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="arrivals of signals", daemon=True).start()

    def _read(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):  # nothing once the writer is closed
                for number in numbers:
                    self._arrived(number)

    def close(self) -> None:
        """End the thread, and write to what signals were written to before."""
        with suppress(ValueError):  # it was closed meanwhile
            signal.set_wakeup_fd(self._before)
        self._writer.close()
