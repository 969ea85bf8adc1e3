"""`statistics.json`: mean and standard deviation per channel, from `data-prep info --statistics`.

It is stored next to the manifest and records which shards it was measured on.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from data_prep.bounds import Count, Finite, Whole
from data_prep.format.atomic import atomic_write_bytes, remove_leftovers
from data_prep.format.manifest import Manifest, ManifestError
from data_prep.validation import parse_json

STATISTICS_NAME = "statistics.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation per channel, over every value of all images of one kind."""

    images: Count
    """Images measured."""
    is_array: bool
    """Whether they are NumPy arrays rather than pictures."""
    scale: str
    """`0 to 1`: integers divided by the maximum of their type; `as stored`: floating point."""
    mean: tuple[Finite, ...]
    """Mean of each channel."""
    std: tuple[Finite, ...]
    """Standard deviation of each channel."""
    missing: Whole
    """NaN and no-data values, which are not counted."""
    values: tuple[Whole, ...] = ()
    """Values counted of each channel; empty in files of earlier versions."""

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)


@dataclass(frozen=True, kw_only=True)
class _File:
    shards: str
    """Digest of the shards that were measured."""
    statistics: tuple[Statistics, ...]


def write_statistics(manifest: Manifest, statistics: Sequence[Statistics]) -> None:
    """Write `statistics.json` next to the manifest, which is not changed.

    Raises:
        OSError: the folder cannot be written.
    """
    values = {
        "format": "simmim-statistics",
        "shards": _digest_shards(manifest),
        "statistics": [asdict(one) for one in statistics],
    }
    text = json.dumps(values, indent=1) + "\n"
    remove_leftovers(manifest.folder)
    atomic_write_bytes(manifest.folder / STATISTICS_NAME, text.encode())


def read_statistics(manifest: Manifest) -> tuple[Statistics, ...]:
    """Read the statistics of a set: one entry per kind of image, the most frequent kind first.

    Raises:
        ManifestError: nothing was measured, or the shards have changed since.
    """
    path = manifest.folder / STATISTICS_NAME
    command = f"data-prep info {manifest.folder} --statistics"
    try:
        file = parse_json(path.read_text(encoding="utf-8"), _File)
        if any(len(one.std) != one.channels or not one.mean for one in file.statistics):
            raise ValueError("mean and std must have one number per channel")
    except FileNotFoundError:
        raise ManifestError(
            f"{manifest.folder} has no {STATISTICS_NAME}. Measure: {command}"
        ) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} is damaged ({error}). Measure again: {command}") from None
    if file.shards != _digest_shards(manifest) or not file.statistics:
        raise ManifestError(f"{path} was measured on other shards. Measure again: {command}")
    return file.statistics


def _digest_shards(manifest: Manifest) -> str:
    digest = hashlib.sha256()
    for shard in manifest.shards:
        digest.update(f"{shard.name} {shard.samples} {shard.sha256}\n".encode())
    return digest.hexdigest()
