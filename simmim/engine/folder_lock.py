"""Lock on an output folder, so that one run at a time writes there."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
"""File in the folder that is locked by the process that writes there."""

_held: set[Path] = set()
"""Folders that this process has locked: for the system, one process may lock a file twice."""
_holding = threading.Lock()


@contextmanager
def locked_folder(path: Path, timeout: float = 10.0) -> Iterator[None]:
    """Lock a folder, created if missing, against other processes and other runs of this one.

    The lock ends with the context, or with the process. What was checked before has to be checked
    again within: another process may have written into the folder while this one waited.

    Args:
        path: the folder.
        timeout: seconds to wait for a previous process: ranks outlive a kill by a moment.

    Raises:
        ValueError: another process, or another run of this one, holds the lock.
    """
    path.mkdir(parents=True, exist_ok=True)
    known = path.resolve()
    with _holding:
        if known in _held:
            raise _occupied(path, "another run in this process")
        _held.add(known)
    try:
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, path, time.monotonic() + timeout)
            yield
        finally:
            os.close(file)
    finally:
        with _holding:
            _held.discard(known)


def _lock(file: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            if time.monotonic() > deadline:
                raise _occupied(path, "another process") from None
            time.sleep(0.1)
        else:
            return


def _occupied(path: Path, writer: str) -> ValueError:
    return ValueError(
        f"{writer} is writing into {path}: wait for it, stop it, or choose another folder with "
        "--folder."
    )
