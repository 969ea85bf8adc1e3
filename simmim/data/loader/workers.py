"""Data worker processes: their signals, and their death. Only the main process ends them."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import TypeVar

from torch.utils.data import DataLoader

from simmim.data.loader.batch import Batch, Failure

Item = TypeVar("Item")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop: from a terminal, a launcher, or Slurm before the time limit."""


def start_without_stop_signals(loader: DataLoader[Item]) -> Iterator[Item]:
    """Start the workers with stop signals blocked until `init_worker` handles them.

    A terminal or a launcher signals the whole process group; only the main process decides how a
    run ends, and it needs its workers until then.
    """
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # it would unblock the signals if started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn about any thread; torch's own threads survive a fork.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(_worker: int) -> None:
    """Make a worker exit only if its parent terminates it or is gone, whoever else signals it."""
    ignored = {signal.SIGINT, signal.SIGUSR1}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    if hasattr(signal, "sigtimedwait"):  # SIGTERM stays blocked; the thread receives it
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def exit_with_parent(starter: int) -> None:
    """Exit once the parent is gone or sends SIGTERM, as Python does before it exits.

    `starter` is the process that started this one: the parent, or the fork server, which dies
    with it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == starter and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def next_batch(batches: Iterator[Batch | Failure]) -> Batch | Failure | None:
    """Return the next batch, the error that prevented it, or None at the end."""
    try:
        return next(batches, None)
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        # The last three come from tensors whose sender is dead.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        return Failure(
            f"a data worker died ({error or 'without an error'}); most often the machine ran out"
            " of memory or of shared memory (/dev/shm): use fewer workers, or smaller batches."
        )
