"""External merge sort of lines, in bounded memory."""

import heapq
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from data_prep.format.atomic import name_in_errors

_LINES_IN_MEMORY = 50_000
_MAX_MERGED_RUNS = 200


class ExternalSort:
    """Lines added in any order and returned sorted by key, then by content.

    Runs of lines are sorted in memory, written to files, and merged.
    """

    def __init__(self, folder: Path, name: str, *, lines_in_memory: int = _LINES_IN_MEMORY) -> None:
        self._folder, self._name = folder, f"{name}-{os.getpid()}"
        self._lines_in_memory = lines_in_memory
        self._lines: list[str] = []
        self._runs: list[Path] = []
        self._made = 0

    def add(self, key: str, line: str) -> None:
        """Add a line; line and key must be ASCII without tabs and line breaks."""
        self._lines.append(f"{key}\t{line}\n")
        if len(self._lines) >= self._lines_in_memory:
            self._write_run(sorted(self._lines))
            self._lines = []

    def merged(self) -> Iterator[tuple[str, str]]:
        """Yield (key, line) in order, then remove the files.

        Raises:
            OSError: the disk is full or cannot be read.
        """
        self._lines.sort()
        try:
            while len(self._runs) > _MAX_MERGED_RUNS:
                runs, self._runs = self._runs[:_MAX_MERGED_RUNS], self._runs[_MAX_MERGED_RUNS:]
                self._write_run(self._merge(runs))
                for run in runs:
                    run.unlink()
            for line in heapq.merge(self._lines, self._merge(self._runs)):
                key, _, text = line.rstrip("\n").partition("\t")
                yield key, text
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove all files and lines."""
        for run in self._runs:
            run.unlink(missing_ok=True)
        self._runs, self._lines = [], []

    def _write_run(self, lines: Iterator[str] | list[str]) -> None:
        path = self._folder / f".{self._name}-{self._made}.run"
        self._made += 1
        self._runs.append(path)
        with name_in_errors(path), path.open("w", encoding="ascii", newline="\n") as file:
            file.writelines(lines)

    def _merge(self, runs: list[Path]) -> Iterator[str]:
        with ExitStack() as stack:
            files = [
                stack.enter_context(run.open(encoding="ascii", newline="\n", buffering=2**16))
                for run in runs
            ]
            yield from heapq.merge(*files)
