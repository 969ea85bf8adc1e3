"""Lock on an output folder, so that one run at a time writes there."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
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
    again within: another process may have written into the folder while this one waited. If nothing
    was written within, the folder is left as it was, or removed again.

    Args:
        path: the folder.
        timeout: seconds to wait for a previous process: ranks outlive a kill by a moment.

    Raises:
        ValueError: another process, or another run of this one, holds the lock.
    """
    known = path.resolve()
    with _holding:
        if known in _held:
            raise _occupied(path, "another run in this process")
        _held.add(known)
    try:
        file, restore = _open_locked(path, time.monotonic() + timeout)
        try:
            yield
        finally:
            restore()
            os.close(file)
    finally:
        with _holding:
            _held.discard(known)


def _open_locked(path: Path, deadline: float) -> tuple[int, Callable[[], None]]:
    """Create, open and lock the file of a folder; return it, and what removes what is new of it."""
    while True:
        new = [one for one in (path / LOCK, path, *path.parents) if not one.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the folder again
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
            continue
        try:
            if not _lock(file, path, deadline):
                return file, lambda: None  # another process may be about to write
            if _is_in_place(file, path / LOCK):
                return file, partial(_remove_unused, new)
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the process that held it has removed it


def _remove_unused(new: Sequence[Path]) -> None:
    """Remove a lock file and the folders around it, which are all new, if nothing else is there."""
    if not new or new[0].name != LOCK:
        return
    lock, *folders = new
    with suppress(OSError):  # not to hide why nothing was written
        if [one.name for one in lock.parent.iterdir()] == [LOCK]:
            lock.unlink()
            for folder in folders:
                folder.rmdir()


def _is_in_place(file: int, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: int, path: Path, deadline: float) -> bool:
    """Wait for the lock; return False on a file system without locks."""
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return False
            if time.monotonic() > deadline:
                raise _occupied(path, "another process") from None
            time.sleep(0.1)
        else:
            return True


def _occupied(path: Path, writer: str) -> ValueError:
    return ValueError(
        f"{writer} is writing into {path}: wait for it, stop it, or choose another folder with "
        "--folder."
    )
