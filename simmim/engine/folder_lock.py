"""Lock on an output folder, so that one process at a time writes there."""

import errno
import fcntl
import os
import time
from pathlib import Path

LOCK = ".lock"
"""File in the folder that is locked by the process that writes there."""


def lock_folder(path: Path, timeout: float = 10.0) -> None:
    """Lock a folder, created if missing, against other processes until this one ends.

    What was checked before has to be checked again afterwards: another process may have written
    into the folder while this one waited.

    Args:
        path: the folder.
        timeout: seconds to wait for a previous process: ranks outlive a kill by a moment.

    Raises:
        ValueError: another process holds the lock.
    """
    path.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    # Never closed, so that the lock lasts as long as the process.
    file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another process is writing into {path}: wait for it, stop it, or choose "
                    "another folder with --folder."
                ) from None
            time.sleep(0.1)
        else:
            return
