"""Assignment of samples to shards: a pure function of the listing and the options."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_prep.sources.files import SourceFile
from data_prep.write.options import ShardOptions

_MAX_SAMPLES = 10_000
_MAX_BYTES = 256 * 2**20
LISTING_NAME = "listing.jsonl"
"""Listing of the files of all shards."""
MIN_SHARDS = 8
"""Minimum number of shards by default, unless there are fewer samples."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The files of one shard."""

    number: int
    """Position among all planned shards, from 0."""
    first: int
    """Position of its first sample among all samples, and so its key."""
    samples: int
    """Number of files."""
    start: int
    """Offset of its files in the listing, in bytes."""
    length: int
    """Length of its part of the listing in bytes."""
    listing: str = LISTING_NAME
    """Name of the listing."""
    digest: str = ""
    """SHA-256 of its listing if it has its own, otherwise empty."""


class Cutter:
    """Cuts a sequence of files of known count and total length into shards.

    Shards have nearly equal numbers of samples, or are filled one by one with `bytes_per_shard`.
    """

    def __init__(
        self, *, count: int, total_bytes: int, options: ShardOptions, min_shards: int
    ) -> None:
        self._greedy = options.bytes_per_shard
        self._most_samples = options.samples_per_shard or _MAX_SAMPLES
        self._count, self._shards = (
            count,
            count_shards(count, total_bytes, options, min_shards=min_shards),
        )
        self._seen = self._samples = self._bytes = self._cut = 0

    def starts_shard(self, size: int) -> bool:
        """Return whether the next file, of that many bytes, starts a new shard."""
        if self._greedy is not None:
            full = self._bytes + size > self._greedy or self._samples == self._most_samples
            new = self._samples == 0 or full
        else:
            new = self._seen == self._cut * self._count // self._shards
        if new:
            self._samples = self._bytes = 0
            self._cut += 1
        self._seen += 1
        self._samples += 1
        self._bytes += size
        return new


def cut_stream(
    files: Iterable[tuple[str, int]], options: ShardOptions, *, min_shards: int = MIN_SHARDS
) -> Iterator[list[str]]:
    """Cut a stream of files of unknown length into shards.

    Shards are filled one after another. If everything fits into one, it is cut evenly into
    `min_shards`, unless the options set the size of shards.

    Args:
        files: lines of a listing, each with the length of its image in bytes.
        options: size of shards.
        min_shards: minimum number of shards by default, unless there are fewer samples.

    Yields:
        The lines of a shard.
    """
    by_default = options.samples_per_shard is None and options.bytes_per_shard is None
    most_samples = options.samples_per_shard or _MAX_SAMPLES
    most_bytes = _MAX_BYTES if by_default else options.bytes_per_shard
    shard: list[str] = []
    held, is_first = 0, True
    for line, size in files:
        overfull = most_bytes is not None and held + size > most_bytes
        if shard and (overfull or len(shard) == most_samples):
            yield shard
            shard, held, is_first = [], 0, False
        shard.append(line)
        held += size
    parts = min(len(shard), min_shards if by_default and is_first else 1)
    for part in range(parts):
        yield shard[part * len(shard) // parts : (part + 1) * len(shard) // parts]


def count_shards(
    count: int, total_bytes: int, options: ShardOptions, *, min_shards: int = MIN_SHARDS
) -> int:
    """Return the number of shards if files are divided into nearly equal numbers of samples."""
    if options.samples_per_shard is not None:
        return -(-count // options.samples_per_shard)
    by_samples = -(-count // _MAX_SAMPLES)
    by_bytes = -(-total_bytes // _MAX_BYTES)
    return min(count, max(by_samples, by_bytes, min_shards))


def is_held_out(path: str, options: ShardOptions) -> bool:
    """Return whether a file is for validation, by its path and the seed alone."""
    if not options.validation_fraction:
        return False
    draw = _keyed_digest(path, options.seed, person=b"validation")
    return int.from_bytes(draw[:8], "big") < options.validation_fraction * 2**64


def order_key(file: SourceFile, options: ShardOptions, window: int = 0) -> str:
    """Return the sort key of a file: its window, then a keyed digest of its path.

    Files for validation come last. The digest does not depend on any random generator's version.
    """
    group = "1" if is_held_out(file.path, options) else "0"
    place = "" if options.window is None else f"{window:016x}"
    return group + place + _keyed_digest(file.path, options.seed).hex()


def path_key(path: str) -> str:
    """Return ASCII text that sorts like the path."""
    return path.encode("utf-8", "surrogateescape").hex()


def _keyed_digest(path: str, seed: int, person: bytes = b"") -> bytes:
    key = seed.to_bytes(16, "little", signed=True)
    data = path.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16, key=key, person=person).digest()
