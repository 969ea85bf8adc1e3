"""Failed writes, usually because of a full disk: explain, warn and continue."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk, an exceeded quota and a file size limit."""


def why_not_written(error: OSError, place: Path, needed: int | None = None) -> str:
    """Return why a file could not be written, with the needed and the free space.

    Args:
        error: the error of the write.
        place: folder on the disk.
        needed: needed space in bytes; None if unknown.
    """
    reason = error.strerror or str(error)
    room = [] if needed is None else [f"{needed / 2**20:.1f} MiB are needed"]
    if error.errno in FULL:
        room.append(f"{free_bytes(place) / 2**20:.1f} MiB are free")
    return f"{reason} ({', '.join(room)} in {place})" if room else reason


def free_bytes(place: Path) -> int:
    """Return the free bytes on the disk of `place`, which need not exist."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def skip_if_unwritable(what: str, file: Path) -> Iterator[None]:
    """Turn an OSError within this context into a warning: training continues without the file."""
    try:
        yield
    except OSError as error:
        sys.stderr.write(
            f"\nWARNING: {what} cannot be written: {why_not_written(error, file.parent)}. Training"
            " continues; free some space.\n"
        )


def append_line(file: FileIO, line: bytes) -> None:
    """Append a line to an open, unbuffered file and flush it to disk; a partial line is removed.

    Raises:
        OSError: the line cannot be written.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), end)  # the next line would be appended to a partial one
        raise
