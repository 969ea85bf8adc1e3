"""`statistics.json`: mean and standard deviation per channel, from `data-prep info --statistics`.

It is stored next to the manifest and records which shards it was measured on.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.format.atomic import atomic_write_bytes, remove_leftovers
from data_prep.format.manifest import Manifest, ManifestError

STATISTICS_NAME = "statistics.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation per channel, over every value of all images of one kind."""

    images: int
    """Images measured."""
    is_array: bool
    """Whether they are NumPy arrays rather than pictures."""
    scale: str
    """`0 to 1`: integers divided by the maximum of their type; `as stored`: floating point."""
    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    missing: int
    """NaN values, which are not counted."""

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)


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
        values = json.loads(path.read_text(encoding="utf-8"))
        measured = [_parse_statistics(one) for one in values["statistics"]]
        shards = values["shards"]
    except FileNotFoundError:
        raise ManifestError(
            f"{manifest.folder} has no {STATISTICS_NAME}. Measure: {command}"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged ({error}). Measure again: {command}") from None
    if shards != _digest_shards(manifest) or not measured:
        raise ManifestError(f"{path} was measured on other shards. Measure again: {command}")
    return tuple(measured)


def _parse_statistics(values: dict[str, Any]) -> Statistics:
    mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
    one = Statistics(**values | {"mean": mean, "std": std})
    if len(mean) != len(std) or not mean or not all(map(math.isfinite, mean + std)):
        raise ValueError("mean and std must be finite, with one number per channel")
    return one


def _digest_shards(manifest: Manifest) -> str:
    digest = hashlib.sha256()
    for shard in manifest.shards:
        digest.update(f"{shard.name} {shard.samples} {shard.sha256}\n".encode())
    return digest.hexdigest()
