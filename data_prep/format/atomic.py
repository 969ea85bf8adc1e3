"""Atomic writes: a file appears complete or not at all.

A file is written under a hidden sibling name, synced to disk and renamed into place, so that
no reader ever sees half of it and a kill leaves the earlier one. Object stores write whole objects
anyway.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.format.storage import Location, RemotePath

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.partial-(?P<process>\d{1,9})(-\w+)?")


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add the path of a file to errors of the block that lack one, as of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def atomic_write_text(path: Location, text: str) -> None:
    """Write `text` as UTF-8 to `path`, replacing an earlier file in one step."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Location, data: bytes) -> None:
    """Write `data` to `path`, replacing an earlier file in one step.

    The parent folder must exist. A symbolic link is kept: the file it points to is replaced.

    Raises:
        OSError: the file cannot be written; an earlier one is left as it was.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    destination = Path(os.path.realpath(path))
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        with name_in_errors(destination), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(destination)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(destination.parent)


def remove_leftovers(folder: Location, name: str | None = None) -> None:
    """Remove the unfinished files and folders that killed processes have left in a folder.

    Args:
        folder: the folder, which may be missing.
        name: only those of a file of this name; None: all.
    """
    for path in list(folder.iterdir()) if isinstance(folder, Path) and folder.is_dir() else []:
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or name not in (None, found["name"]):
            continue
        if _is_running(int(found["process"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk, after files were renamed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
