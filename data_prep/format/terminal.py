"""Standard output and error that may be closed, broken or full.

A command that prints its result ends quietly when nobody reads it, as other Unix tools do. A
training continues without a terminal: it outlives the one it was started in.
"""

import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from typing import Any, TypeAlias

BROKEN_PIPE = 141
"""Exit code of a command whose output is no longer read: 128 + SIGPIPE, as a shell reports it."""
CANNOT_WRITE = 2
"""Exit code of a command whose output cannot be written, for example on a full disk."""

ExitCode: TypeAlias = str | int | None
"""What `sys.exit` takes."""

_WAIT = 1.0
"""Seconds between two attempts at a non-blocking terminal that does not take more output."""


class OutputFile(io.FileIO):
    """File descriptor of a standard stream.

    Args:
        descriptor: its number; it is not closed with this object.
        name: name for error messages.
        optional: drop what cannot be written. Otherwise a broken pipe ends the process quietly, by
            SystemExit, and other failures are raised once, and kept as `failure`: argparse, for
            one, drops them.

    Attributes:
        failure: why output was lost that is not optional, or None.
    """

    def __init__(self, descriptor: int, name: str, *, optional: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = name
        self.optional = optional
        self.failure: OSError | None = None
        self._is_gone = False

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them if nobody can receive them; return their number."""
        length = memoryview(data).nbytes
        if self._is_gone:
            return length
        try:
            while (written := super().write(data)) is None:  # a non-blocking terminal
                select.select([], [self.fileno()], [], _WAIT)
        except OSError as error:
            gone = error.errno == errno.EPIPE
            self._is_gone = gone or not self.optional
            if self.optional:
                return length
            if gone:
                raise SystemExit(BROKEN_PIPE) from None
            self.failure = OSError(error.errno, error.strerror, self.name)
            raise self.failure from None
        return written


class OutputText(io.TextIOWrapper):
    """Text of a standard stream, in which control characters are shown as escapes.

    Carriage returns, tabs and the cursor movements of tqdm are kept; on a terminal also colours,
    which libraries use.
    """

    def write(self, text: str, /) -> int:
        """Write text."""
        if _CONTROL.search(text) and not _MOVES_UP.fullmatch(text):
            pattern = _CONTROL_OR_COLOUR if self.isatty() else _CONTROL
            super().write(pattern.sub(_escaped, text))
        else:
            super().write(text)
        return len(text)


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CONTROL_OR_COLOUR = re.compile(rf"\x1b\[[0-9;]*m|{_CONTROL.pattern}")
_MOVES_UP = re.compile(r"(\x1b\[A)+")


def _escaped(found: re.Match[str]) -> str:
    text = found[0]
    return ascii(text)[1:-1] if len(text) == 1 else text


def protect_output(*, optional: bool) -> None:
    """Make standard output and error robust; see `OutputFile`.

    Descriptors that were closed when the process started are opened on the null device: files
    opened later would take their numbers, and receive what libraries print.

    Args:
        optional: whether the command continues without them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for descriptor, attribute in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, attribute)
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(raw, OutputFile):
            raw.optional = optional
        elif stream is None or _descriptor_of(stream) == descriptor:
            setattr(sys, attribute, _protected(stream, descriptor, attribute, optional))


def _descriptor_of(stream: io.TextIOBase) -> int:
    with suppress(OSError, ValueError, AttributeError):
        return stream.fileno()
    return -1


def _protected(
    stream: "io.TextIOWrapper | None", descriptor: int, name: str, optional: bool
) -> io.TextIOWrapper:
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    file = OutputFile(descriptor, f"<{name}>", optional=optional)
    return OutputText(
        io.BufferedWriter(file),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",  # a name that the terminal cannot show is no error
        line_buffering=name == "stderr" or file.isatty(),
        write_through=getattr(stream, "write_through", False),
    )


def flush_output(code: ExitCode = 0) -> ExitCode:
    """Flush standard output and error at the end of a command; return its exit code.

    Args:
        code: exit code if they can be flushed, as for `sys.exit`.
    """
    for stream in (sys.stdout, sys.stderr):
        lost = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "failure", None)
        try:
            stream.flush()
        except SystemExit as ending:
            code = code or ending.code
        except OSError as error:
            lost = error
        if lost is not None and code in (None, 0):  # otherwise it was said when it happened
            code = CANNOT_WRITE
            with suppress(OSError, SystemExit):
                sys.stderr.write(f"{lost.filename or 'output'}: {lost.strerror}.\n")
                sys.stderr.flush()
    return code
