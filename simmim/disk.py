"""Files that cannot be written, for a full disk most often: said loudly, and training goes on."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a disk, a quota and a limit on files say when they are full."""


def why_not_written(error: OSError, place: Path, needed: int | None = None) -> str:
    """Return why something could not be written, with the free and the needed space."""
    reason = error.strerror or str(error)
    room = [] if needed is None else [f"{needed / 2**20:.1f} MiB are needed"]
    if error.errno in FULL:
        room.append(f"{free_bytes(place) / 2**20:.1f} MiB are free")
    return f"{reason} ({', '.join(room)} in {place})" if room else reason


def free_bytes(place: Path) -> int:
    """Return the free space where `place` is, or would be."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def goes_on_without(what: str, place: Path) -> Iterator[None]:
    """Within this context a file that cannot be written is warned of, and nothing else."""
    try:
        yield
    except OSError as error:
        sys.stderr.write(
            f"\nWARNING: {what} cannot be written: {why_not_written(error, place.parent)}. Training"
            " goes on; make room.\n"
        )


def append_whole(file: FileIO, line: bytes) -> None:
    """Append to an open, unbuffered file and wait for the disk; a part of a line is taken back.

    Raises:
        OSError: there is no room.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), end)  # half a line would spoil the next one
        raise
