"""Samples that could not be read as they should: counted, named in a file, and too many refused."""

import fcntl
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simmim.data.order.errors import DataError
from simmim.disk import append_whole, goes_on_without

JUDGED_SAMPLES = 1000
"""Bad samples are judged as a share of at least this many, so that few early ones stop nothing."""

MAX_BAD_SHARE = 0.01

REMEDY = "Make the shards again with `data-prep shard`, mend the files of a folder of images"


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """What was wrong with one sample, and what became of it."""

    kind: Literal["replaced", "skipped", "repaired"]
    """`replaced`: training took another of the shard; `skipped`: evaluation went without it;
    `repaired`: it is damaged and was read all the same, so that some pixels may be wrong."""
    folder: str
    shard: str
    key: str
    reason: str


class BadSamples:
    """The account of bad samples that a process keeps.

    Args:
        max_share: of the samples asked for that may be bad, 0 to 1; repaired ones do not count.
        remedy: what to do where there are more.
    """

    def __init__(self, max_share: float = MAX_BAD_SHARE, *, remedy: str = REMEDY) -> None:
        self.max_share = max_share
        self.remedy = remedy
        self.asked = 0
        """Samples that were asked for."""
        self.bad = 0
        """Samples that were replaced or skipped, as often as they were."""
        self.repaired = 0
        """Samples that were read although damaged, as often as they were."""
        self.first: BadSample | None = None
        """The first that was replaced or skipped."""
        self.path: Path | None = None
        self._named: set[tuple[str, ...]] = set()
        self._read = 0

    def write_to(self, path: Path) -> None:
        """Name each bad sample in this file from now on, once: a JSON object a line.

        Several processes may write to it, and it may be there from before.
        """
        self.path = path

    def summary(self) -> str:
        """Return how many samples were bad, and which was the first, for a person."""
        text = f"{self.bad} of {self.asked} samples, which could not be read"
        if self.first is None:
            return text
        return f"{text} (the first: {self.first.shard}/{self.first.key}, {self.first.reason})"

    def record(self, asked: int, found: Iterable[BadSample]) -> None:
        """Count the samples asked for, and name the bad ones among them.

        Raises:
            DataError: more of them are bad than `max_share` allows.
        """
        self.asked += asked
        last = None
        for sample in found:
            if sample.kind == "repaired":
                self.repaired += 1
            else:
                self.bad += 1
                self.first = self.first or sample
                last = sample
            self._name(sample)
        if last is not None and self.bad > self.max_share * max(self.asked, JUDGED_SAMPLES):
            raise DataError(
                f"{self.bad} of {self.asked} samples could not be read, more than"
                f" data.max_bad_share {self.max_share:g} allows (of at least {JUDGED_SAMPLES});"
                f" the last is sample {last.shard}/{last.key} in {last.folder}: {last.reason}."
                + (f" All are named in {self.path}." if self.path else "")
                + f" {self.remedy}, or raise data.max_bad_share"
            )

    def _name(self, sample: BadSample) -> None:
        mark = (sample.kind, sample.folder, sample.shard, sample.key)
        if self.path is None or mark in self._named:
            return
        with (
            goes_on_without("the name of a bad sample", self.path),
            self.path.open("ab+", buffering=0) as file,
        ):
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # what a kill cut short
                file.truncate(self._read + sum(map(len, lines[:-1])))
            for line in lines:  # what other processes, or an earlier run, wrote
                with suppress(ValueError, TypeError, KeyError):
                    known = json.loads(line)
                    fields = ("kind", "folder", "shard", "key")
                    self._named.add(tuple(str(known[name]) for name in fields))
            file.seek(0, os.SEEK_END)
            if mark not in self._named:
                line = json.dumps(vars(sample), ensure_ascii=False).encode() + b"\n"
                append_whole(file, line)
                self._named.add(mark)
            self._read = file.tell()
