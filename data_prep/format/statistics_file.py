"""`statistics.json`: mean and spread of each channel, as `data-prep info --statistics` found them.

It lies beside the manifest, and says of which shards it is.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.manifest import Manifest, ManifestError

STATISTICS_NAME = "statistics.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and spread of each channel, over every value of the images of one kind."""

    images: int
    """Images measured."""
    is_array: bool
    """Whether they are arrays rather than pictures."""
    scale: str
    """`0 to 1`: integers divided by the largest of their type; `as stored`: other numbers."""
    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    missing: int
    """Values that are not numbers, and do not count."""

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)


def write_statistics(manifest: Manifest, statistics: Sequence[Statistics]) -> None:
    """Write `statistics.json` beside the manifest, which stays as it is.

    Raises:
        OSError: the folder cannot be written.
    """
    values = {
        "format": "simmim-statistics",
        "shards": _digest_shards(manifest),
        "statistics": [asdict(one) for one in statistics],
    }
    text = json.dumps(values, indent=1) + "\n"
    atomic_write_bytes(manifest.folder / STATISTICS_NAME, text.encode())


def read_statistics(manifest: Manifest) -> tuple[Statistics, ...]:
    """Return what was measured of a set, of each kind of image, the most frequent kind first.

    Raises:
        ManifestError: nothing was measured, or it was measured of other shards.
    """
    path = manifest.folder / STATISTICS_NAME
    remedy = f"Measure them: data-prep info {manifest.folder} --statistics"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        measured = [_parse_statistics(one) for one in values["statistics"]]
        shards = values["shards"]
    except FileNotFoundError:
        raise ManifestError(f"{manifest.folder} has no {STATISTICS_NAME}. {remedy}") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged ({error}). {remedy}") from None
    if shards != _digest_shards(manifest) or not measured:
        raise ManifestError(f"{path} is of other shards than are there now. {remedy}")
    return tuple(measured)


def _parse_statistics(values: dict[str, Any]) -> Statistics:
    mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
    one = Statistics(**values | {"mean": mean, "std": std})
    if len(mean) != len(std) or not mean or not all(map(math.isfinite, mean + std)):
        raise ValueError("mean and std must be numbers, one a channel")
    return one


def _digest_shards(manifest: Manifest) -> str:
    digest = hashlib.sha256()
    for shard in manifest.shards:
        digest.update(f"{shard.name} {shard.samples} {shard.sha256}\n".encode())
    return digest.hexdigest()
