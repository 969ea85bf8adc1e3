"""Shards that a command writes to its standard output, as WebDataset's `pipe:` URLs name them.

A command is run only for who said so: `allow_pipe` of a recipe, or `--allow-pipe` of `data-prep`.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from data_prep.format.storage import ATTEMPTS, FIRST_DELAY, LONGEST_DELAY, StorageError

PIPE = "pipe:"
"""What the URL of a command begins with."""

_TAR_NAME = re.compile(r"[^\s/\\'\"=;|&<>().][^\s/\\'\"=;|&<>()]*?\.tar\b")
_BLOCK = 2**20


@dataclass(frozen=True)
class PipedFile:
    """The output of a shell command. Whoever makes one has been told that the command may run."""

    command: str
    attempts: int = ATTEMPTS

    def __str__(self) -> str:
        return PIPE + self.command

    @property
    def name(self) -> str:
        """File name of the last tar that the command names.

        Raises:
            StorageError: it names none.
        """
        names = _TAR_NAME.findall(self.command)
        if not names:
            raise StorageError(
                f"{self} names no tar, so its output has no name: write the command such that the "
                "tar's name is in it, if only as a comment (`… # shard-000000.tar`)."
            )
        return str(names[-1])

    @property
    def stem(self) -> str:
        """Name without its last suffix."""
        return PurePosixPath(self.name).stem

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """Run the command and yield its output from `start` on; where it fails, it is run again.

        Raises:
            StorageError: it failed every time.
        """
        had = start
        for attempt in range(1, self.attempts + 1):
            with _running(self.command) as (process, output):
                place = 0
                while block := output.read(_BLOCK):
                    new = block[max(0, had - place) :]
                    place += len(block)
                    had = max(had, place)
                    if new:
                        yield new
                code = process.wait()
            if code == 0:
                return
            if attempt < self.attempts:
                time.sleep(min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1)))
        raise StorageError(f"{self} failed {self.attempts} times, last with exit code {code}.")


@contextmanager
def _running(command: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Run a command in a session of its own, all of which ends with the block."""
    with subprocess.Popen(  # noqa: S602 - a shell's pipeline is what users write
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
