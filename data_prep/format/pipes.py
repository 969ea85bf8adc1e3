"""Shards that a shell command writes to its standard output: `pipe:` URLs as in WebDataset.

Commands run only if explicitly allowed: `allow_pipe` in a recipe, `--allow-pipe` of `data-prep`.
"""

import os
import re
import signal
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO

from data_prep.format.storage import ATTEMPTS, read_resumed
from data_prep.format.stores import StorageError

PIPE = "pipe:"
"""Prefix of the URL of a command."""

MAX_COMMANDS = 1_000_000
"""Largest number of commands that one with a range stands for."""

_RANGE = re.compile(r"(.*?)\{(\d+)\.\.(\d+)\}(.*)", re.DOTALL)
_TAR_NAME = re.compile(r"[^\s/\\'\"=;|&<>().][^\s/\\'\"=;|&<>()]*?\.tar\b")
_BLOCK = 2**20


@dataclass(frozen=True)
class PipedFile:
    """The output of a shell command; build one only if the command is allowed to run."""

    command: str
    attempts: int = ATTEMPTS

    def __str__(self) -> str:
        return PIPE + self.command

    @property
    def name(self) -> str:
        """File name of the last tar in the command.

        Raises:
            StorageError: the command contains no tar name.
        """
        names = _TAR_NAME.findall(self.command)
        if not names:
            raise StorageError(
                f"{self} contains no tar name, so its output has no name. Put the name of the tar "
                "into the command, for example as a comment (`… # shard-000000.tar`)."
            )
        return str(names[-1])

    @property
    def stem(self) -> str:
        """Name without its last suffix."""
        return PurePosixPath(self.name).stem

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """Run the command and yield its output from `start`; a failed command is run again.

        Raises:
            StorageError: every attempt failed.
        """
        try:
            yield from read_resumed(self._output, start, self.attempts, _is_exit)
        except _ExitError as error:
            times = "once" if self.attempts == 1 else f"{self.attempts} times in a row"
            raise StorageError(f"{self} failed {times}, last with exit code {error}.") from None

    def _output(self) -> Generator[bytes, None, None]:
        with _running(self.command) as (process, output):
            while block := output.read(_BLOCK):
                yield block
            code = process.wait()
        if code:
            raise _ExitError(code)


def expand_command(source: PipedFile) -> list[PipedFile]:
    """Return the commands of one with a range of numbers in braces, or the command itself.

    Raises:
        StorageError: the range is malformed, or two outputs would have the same name.
    """
    pattern = _RANGE.fullmatch(source.command)
    if pattern is None:
        return [source]
    head, first, last, tail = pattern.groups()
    if int(last) < int(first) or int(last) - int(first) >= MAX_COMMANDS:
        raise StorageError(
            f"{source}: numbers in braces must ascend, over at most {MAX_COMMANDS:,} tars."
        )
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    commands = [replace(source, command=f"{head}{number}{tail}") for number in numbers]
    if len({command.name for command in commands}) < len(commands):
        raise StorageError(f"{source}: the number in braces must be in the name of the tar.")
    return commands


class _ExitError(Exception):
    """A command failed; its argument is the exit code."""


def _is_exit(error: Exception) -> bool:
    return isinstance(error, _ExitError)


@contextmanager
def _running(command: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Run a command in its own session, which is killed when the block ends."""
    with subprocess.Popen(  # noqa: S602 - users write shell pipelines
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
