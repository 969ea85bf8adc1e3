"""Tasks run in worker processes with progress reports, and interrupts raised as an exception.

Python drops an exception raised while a finalizer runs, and a signal may arrive at any time. So a
received signal is remembered, and raised again at the next progress report.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], object]
"""Progress callback, called with the number of samples done since the last call."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals from a terminal, a scheduler and a dropped connection."""

_SECONDS_BETWEEN_TICKS = 0.1


class WorkerError(RuntimeError):
    """A worker process failed for a reason other than its input."""


class LostWorkerError(WorkerError):
    """A worker process died, such as one killed for memory: running again may succeed."""


def available_cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class TaskQueue(Generic[Task]):
    """Tasks in order, each held back until it may start.

    Args:
        tasks: the tasks; the next one is drawn only when it is needed.
        may_start: whether a task may start. It is asked again after every result, and must return
            True once all earlier tasks are done.
    """

    def __init__(self, tasks: Iterable[Task], may_start: Callable[[Task], bool]) -> None:
        self._tasks, self._may_begin = iter(tasks), may_start
        self._held: list[Task] = []

    def next_task(self) -> Iterator[Task]:
        """Yield the next task, or nothing if none is left or it may not start yet."""
        if not self._held:
            self._held = list(islice(self._tasks, 1))
        if self._held and self._may_begin(self._held[0]):
            yield self._held.pop()


def map_tasks(
    function: Callable[[Task, Tick], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    tick: Tick,
    may_start: Callable[[Task], bool] = lambda _: True,
) -> Iterator[Result]:
    """Yield `function(task, tick)` for every task in order of completion, from worker processes.

    With one worker everything runs in this process. Leaving the iterator early kills the workers,
    so they must write files under temporary names and rename them. Workers ignore interrupts, which
    are left to the parent, and end when the parent is gone.

    Args:
        function: a module-level function.
        tasks: arguments of the calls; a task is sent only to an idle process, and none
            is sent while the caller uses a result.
        workers: number of processes, at least 1.
        tick: called in this process with the number of samples done.
        may_start: see `TaskQueue`; processes wait until it returns True.

    Raises:
        ValueError, OSError: what `function` raised.
        LostWorkerError: a worker died.
        WorkerError: a worker raised something else.
    """
    if workers == 1:
        for task in tasks:
            yield function(task, tick)
        return
    pool = _start(function, workers)
    try:
        yield from _dispatch(pool, TaskQueue(tasks, may_start), tick)
    finally:
        for connection, process in pool.items():
            connection.close()
            process.kill()
            process.join()
            process.close()


def _dispatch(
    pool: dict[Connection, BaseProcess], tasks: TaskQueue[Any], tick: Tick
) -> Iterator[Any]:
    idle, busy = list(pool), list[Connection]()
    _assign(tasks, idle, busy)
    while busy:
        for connection in wait(busy):
            assert isinstance(connection, Connection)
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                pool[connection].join()
                raise LostWorkerError(_describe_death(pool[connection].exitcode)) from None
            if kind == "ticks":
                tick(value)
            elif kind == "error":
                raise value
            else:
                busy.remove(connection)
                idle.append(connection)
                yield value
                _assign(tasks, idle, busy)


def _describe_death(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return (
            "a worker was killed, possibly because memory ran out. Run the same command again with "
            "fewer --workers."
        )
    return f"a worker died with exit code {exit_code}; its output is above."


def _assign(tasks: TaskQueue[Any], idle: list[Connection], busy: list[Connection]) -> None:
    while idle and (task := list(tasks.next_task())):
        connection = idle.pop()
        connection.send(task[0])
        busy.append(connection)


def _start(function: Callable[..., Any], workers: int) -> dict[Connection, BaseProcess]:
    # Spawned: forking a process with threads is unsafe, and a fork would keep every pipe open.
    context = multiprocessing.get_context("spawn")
    pool: dict[Connection, BaseProcess] = {}
    # Started here, since starting it with the first child would unblock interrupts.
    resource_tracker.ensure_running()
    # Children start with interrupts blocked, so that none arrives before they ignore them.
    signals = set(STOP_SIGNALS)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()
            pool[ours] = process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def _serve(function: Callable[[Any, Tick], Any], connection: Connection) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ticks = _Ticks(connection)
    try:
        while True:
            task = connection.recv()
            try:
                result = function(task, ticks)
            except (ValueError, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    return
                connection.send(("error", error))
            except Exception:
                connection.send(("error", WorkerError(traceback.format_exc())))
            else:
                ticks.flush()
                connection.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone or needs no more results


class _Ticks:
    """Forwards progress to the parent, a few times per second."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._done = 0
        self._sent_at = time.monotonic()

    def __call__(self, samples: int) -> None:
        self._done += samples
        if time.monotonic() - self._sent_at > _SECONDS_BETWEEN_TICKS:
            self.flush()

    def flush(self) -> None:
        if self._done:
            self._connection.send(("ticks", self._done))
        self._done, self._sent_at = 0, time.monotonic()


class InterruptedBySignal(KeyboardInterrupt):
    """A stop signal was received."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruption:
    """The signal that was received, if any."""

    def __init__(self) -> None:
        self._number: int | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Raise the first signal; further ones, during the clean-up, are ignored."""
        if self._number is None:
            self._number = number
            raise InterruptedBySignal(number)

    def watch(self, tick: Tick) -> Tick:
        """Return a progress callback that raises a signal received before."""

        def watched(samples: int) -> None:
            if self._number is not None:
                raise InterruptedBySignal(self._number)
            tick(samples)

        return watched


@contextmanager
def raise_on_signals() -> Iterator[Interruption]:
    """Raise `InterruptedBySignal` on stop signals, in the main thread."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, InterruptedBySignal):
            hook(unraisable)

    before = {
        each: signal.signal(each, interruption.receive)
        for each in STOP_SIGNALS
        if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN  # nohup
    }
    hook, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield interruption
    finally:
        sys.unraisablehook = hook
        for each, handler in before.items():
            signal.signal(each, handler)
