"""Which sample goes into which shard: a pure function of the listing and the options."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from data_prep.encoding import Encoding
from data_prep.images import MAX_PIXELS
from data_prep.sources import Selection, SourceFile

_MOST_SAMPLES = 10_000
_MOST_BYTES = 256 * 2**20
_FEWEST_SHARDS = 8


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Everything beside the input that decides what the shards hold."""

    samples_per_shard: int | None = None
    """Most samples in a shard. None: 10,000, fewer where that makes > 256 MiB or < 8 shards."""
    selection: Selection = field(default_factory=Selection)
    """Which files are taken."""
    seed: int = 0
    """Seed of the shuffle over all samples."""
    shuffle: bool = True
    """Whether samples are shuffled; else they are in order of their paths."""
    check: bool = True
    """Whether every image is decoded; else only its header is read."""
    max_pixels: int = MAX_PIXELS
    """Largest image taken, in pixels."""
    encoding: Encoding = field(default_factory=Encoding)
    """Size and format that pictures are to have."""

    def __post_init__(self) -> None:
        for name, value in (
            ("samples-per-shard", self.samples_per_shard),
            ("max-pixels", self.max_pixels),
            ("max-bytes", self.selection.max_bytes),
        ):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed must fit into 64 bits, got {self.seed}.")

    def values(self) -> dict[str, Any]:
        """Return the options as plain values, for the manifest."""
        values: dict[str, Any] = asdict(self)
        selection: dict[str, Any] = values.pop("selection")
        encoding: dict[str, Any] = values.pop("encoding")
        lists = {name: list(selection[name]) for name in ("include", "exclude")}
        return {**values, **encoding, **selection, **lists}


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What one shard is to hold."""

    number: int
    """Position of the shard among all planned, from 0."""
    first: int
    """Position of its first sample among all samples; keys count on from it."""
    files: tuple[SourceFile, ...]
    """Its samples in order."""


def class_name(path: str) -> str | None:
    """Return the name of the folder a file lies in, None where it lies in none."""
    return PurePosixPath(path).parent.name or None


def class_names(files: Sequence[SourceFile]) -> tuple[str, ...]:
    """Return the sorted names of all classes."""
    names = {class_name(file.path) for file in files}
    return tuple(sorted(name for name in names if name is not None))


def plan_shards(files: Sequence[SourceFile], options: ShardOptions) -> Iterator[ShardPlan]:
    """Deal all files to shards of nearly equal numbers of samples."""
    ordered = shuffle_files(files, options.seed) if options.shuffle else files
    shards = count_shards(files, options)
    bounds = [number * len(files) // shards for number in range(shards + 1)]
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield ShardPlan(number=number, first=start, files=tuple(ordered[start:stop]))


def count_shards(files: Sequence[SourceFile], options: ShardOptions) -> int:
    """Return the number of shards that the files are dealt to."""
    if options.samples_per_shard is not None:
        return -(-len(files) // options.samples_per_shard)
    by_samples = -(-len(files) // _MOST_SAMPLES)
    by_bytes = -(-sum(file.size for file in files) // _MOST_BYTES)
    return min(len(files), max(by_samples, by_bytes, _FEWEST_SHARDS))


def shuffle_files(files: Sequence[SourceFile], seed: int) -> list[SourceFile]:
    """Return the files in an order that depends on the seed and on each file's path alone.

    They are sorted by a keyed digest, which no version of any random generator can change.
    """
    key = seed.to_bytes(16, "little", signed=True)

    def draw(file: SourceFile) -> bytes:
        path = file.path.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(path, digest_size=16, key=key).digest()

    return sorted(files, key=draw)
