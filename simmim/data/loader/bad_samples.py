"""Damaged samples: counted, listed in a file, and limited in number."""

import fcntl
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simmim.data.order.source import DataError
from simmim.disk import append_line, skip_if_unwritable

MIN_SAMPLES = 1000
"""Minimum number of samples that the fraction of bad ones is computed over, so that a few early
ones are tolerated."""

MAX_BAD_SHARE = 0.01

REMEDY = "Write the shards again with `data-prep shard`, repair the files of a folder of images"


CHANNELS_REMEDY = (
    "Set encoder.in_channels to the channels of the images, with as many values in data.mean and"
    " data.std, leave out images of other channels"
)


BadKind = Literal["replaced", "skipped", "repaired", "turned", "no image"]
"""How a sample was handled: `replaced`: training used another sample of the shard; `skipped`:
evaluation, or the reading of a stream, left it out; `repaired`: it is damaged but could be decoded,
with some pixels possibly wrong; `turned`: its image was turned upright, and its labels may not be;
`no image`: a sample of a stream that has none, which is counted and is not damaged."""

MOST_WITHOUT_IMAGE = 3
"""Samples without an image that are listed of each kind."""


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A damaged sample, its defect and how it was handled."""

    kind: BadKind
    folder: str
    shard: str
    key: str
    reason: str
    """Its defect; of a sample without an image, the kind of member that it has instead."""


class BadSamples:
    """Counter of the bad samples of a process.

    Args:
        max_share: maximum fraction of bad samples, 0 to 1; repaired and turned ones do not count.
        remedy: remedy named in the error message if there are more.
    """

    def __init__(self, max_share: float = MAX_BAD_SHARE, *, remedy: str = REMEDY) -> None:
        self.max_share = max_share
        self.remedy = remedy
        self.asked = 0
        """Number of requested samples."""
        self.bad = 0
        """Number of replaced or skipped samples, with repetitions."""
        self.repaired = 0
        """Number of damaged samples that could be decoded, with repetitions."""
        self.turned = 0
        """Number of samples whose labels may not be upright, with repetitions."""
        self.without_image: Counter[str] = Counter()
        """Number of samples without an image by what they have instead, with repetitions."""
        self.first: BadSample | None = None
        """The first replaced or skipped sample."""
        self.path: Path | None = None
        self._named: set[tuple[str, ...]] = set()
        self._read = 0

    def write_to(self, path: Path) -> None:
        """List each bad sample once in this file from now on, one JSON object per line.

        Several processes may write to it, and it may exist from before.
        """
        self.path = path

    def summary(self) -> str:
        """Return the number of bad samples, and the first one, for the user."""
        text = f"{self.bad} of {self.asked} samples, which could not be read"
        if self.first is None:
            return text
        return f"{text} (the first: {self.first.shard}/{self.first.key}, {self.first.reason})"

    def record(self, asked: int, found: Iterable[BadSample]) -> None:
        """Count requested samples, and list the bad ones among them.

        Raises:
            DataError: more are bad than `max_share` allows.
        """
        self.asked += asked
        last = None
        for sample in found:
            if sample.kind == "repaired":
                self.repaired += 1
            elif sample.kind == "turned":
                self._warn_of_turned(sample)
            elif sample.kind == "no image":
                self._warn_of_no_image(sample)
                if self.without_image[sample.reason] > MOST_WITHOUT_IMAGE:
                    continue
            else:
                self.bad += 1
                self.first = self.first or sample
                last = sample
            self._name(sample)
        if last is not None and self.bad > self.max_share * max(self.asked, MIN_SAMPLES):
            raise DataError(
                f"{self.bad} of {self.asked} samples could not be read, more than"
                f" data.max_bad_share {self.max_share:g} allows (of at least {MIN_SAMPLES});"
                f" the last is sample {last.shard}/{last.key} in {last.folder}: {last.reason}."
                + (f" All are listed in {self.path}." if self.path else "")
                + f" {self._remedy_for(last)}, or raise data.max_bad_share."
            )

    def _remedy_for(self, sample: BadSample) -> str:
        """Return what to do about a bad sample: images of other channels are not damaged."""
        return CHANNELS_REMEDY if "in_channels" in sample.reason else self.remedy

    def _warn_of_turned(self, sample: BadSample) -> None:
        """Count a sample whose labels may not be upright, and warn of the first."""
        self.turned += 1
        if self.turned == 1:
            listed = f" More are listed in {self.path}." if self.path else ""
            sys.stderr.write(
                f"\nWARNING: sample {sample.shard}/{sample.key} in {sample.folder}: "
                f"{sample.reason}.{listed}\n"
            )

    def _warn_of_no_image(self, sample: BadSample) -> None:
        """Count a sample without an image, and warn of the first of its kind."""
        self.without_image[sample.reason] += 1
        if self.without_image[sample.reason] == 1:
            sys.stderr.write(
                f"\nWARNING: sample {sample.shard}/{sample.key} in {sample.folder} has no image, "
                f"only {sample.reason}; samples like it are left out and counted\n"
            )

    def _name(self, sample: BadSample) -> None:
        mark = (sample.kind, sample.folder, sample.shard, sample.key)
        if self.path is None or mark in self._named:
            return
        with (
            skip_if_unwritable("the name of a bad sample", self.path),
            self.path.open("ab+", buffering=0) as file,
        ):
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # truncated by a kill
                file.truncate(self._read + sum(map(len, lines[:-1])))
            for line in lines:  # what other processes, or an earlier run, wrote
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    known = json.loads(line)
                    fields = ("kind", "folder", "shard", "key")
                    self._named.add(tuple(str(known[name]) for name in fields))
            file.seek(0, os.SEEK_END)
            if mark not in self._named:
                line = json.dumps(vars(sample), ensure_ascii=False).encode() + b"\n"
                append_line(file, line)
                self._named.add(mark)
            self._read = file.tell()
