"""Work shared out to processes: one task at a time each, and a tick for every sample done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], object]
"""Called with the number of samples done since the last call."""

_SECONDS_BETWEEN_TICKS = 0.1


class WorkerError(RuntimeError):
    """A worker process died, or failed in a way that is no fault of the input."""


def available_cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_tasks(
    function: Callable[[Task, Tick], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    tick: Tick,
) -> Iterator[Result]:
    """Yield `function(task, tick)` of every task, as they are done, from `workers` processes.

    With one worker everything happens in this process. Leaving the iterator early kills the
    workers, so what they write must be written aside and renamed. Workers leave interrupts to the
    parent, and end when it is gone.

    Args:
        function: what to do; a module-level function.
        tasks: its arguments; each is sent to a process only when that is free.
        workers: processes to run, at least 1.
        tick: called in this process with the number of samples done.

    Raises:
        ValueError, OSError: what `function` raised.
        WorkerError: a worker died or failed in another way.
    """
    if workers == 1:
        for task in tasks:
            yield function(task, tick)
        return
    pool = _start(function, workers)
    try:
        yield from _share_out(pool, iter(tasks), tick)
    finally:
        for connection, process in pool.items():
            connection.close()
            process.kill()
            process.join()
            process.close()


def _share_out(
    pool: dict[Connection, BaseProcess], tasks: Iterator[Any], tick: Tick
) -> Iterator[Any]:
    busy = [connection for connection in pool if _send_next(connection, tasks)]
    while busy:
        for connection in wait(busy):
            assert isinstance(connection, Connection)
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                pool[connection].join()
                raise WorkerError(_describe_death(pool[connection].exitcode)) from None
            if kind == "ticks":
                tick(value)
            elif kind == "error":
                raise value
            else:
                yield value
                if not _send_next(connection, tasks):
                    busy.remove(connection)


def _describe_death(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return (
            "a worker was killed, perhaps for want of memory. Run the same command again with "
            "fewer --workers."
        )
    return f"a worker died with exit code {exit_code}; what it wrote is above."


def _send_next(connection: Connection, tasks: Iterator[Any]) -> bool:
    try:
        connection.send(next(tasks))
    except StopIteration:
        return False
    return True


def _start(function: Callable[..., Any], workers: int) -> dict[Connection, BaseProcess]:
    # Spawned, since forking a process with threads is unsafe and a fork would hold every pipe open.
    context = multiprocessing.get_context("spawn")
    pool: dict[Connection, BaseProcess] = {}
    # Starting this one, which the first child would do, unblocks interrupts.
    resource_tracker.ensure_running()
    # Children start with interrupts blocked, so that none can strike before they ignore them.
    signals = {signal.SIGINT, signal.SIGTERM}
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
        return  # the parent is gone or wants no more


class _Ticks:
    """Passes ticks on to the parent, a few times a second."""

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
