"""Data workers and signals: the main process alone decides when they end."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import TypeVar

from torch.utils.data import DataLoader

Answer = TypeVar("Answer")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to stop: a terminal, a launcher, and Slurm's warning before the time is up."""


def start_without_stop_signals(
    loader: DataLoader[Answer],
) -> Iterator[Answer]:
    """Start the workers with the stop signals blocked, so that none meets them unprepared.

    A terminal or a launcher signals the whole process group; the main process alone decides how
    a run ends, and needs its workers until then.
    """
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # which would unblock the signals if it started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of any thread; torch's own threads survive a fork.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_only_the_parent(_worker: int) -> None:
    """Make a worker end when its parent asks for it or is gone, and at no other's signal."""
    ignored = {signal.SIGINT, signal.SIGUSR1}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    if hasattr(signal, "sigtimedwait"):  # SIGTERM stays blocked, for the thread to receive
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def end_with_parent(keeper: int) -> None:
    """Wait until the parent is gone or itself sends SIGTERM, as Python does before it ends.

    `keeper` is the process that started this one: the parent, or the fork server, gone with it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == keeper and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
