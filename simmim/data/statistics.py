"""Mean and standard deviation of each channel, as `data-prep info --statistics` measured them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.manifest import Location, locate

STATISTICS_NAME = "statistics.json"
"""File beside the manifest: `mean` and `std`, a number a channel each, and `samples`."""


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Of the pixels of a set, on a scale from 0 to 1 (fractions as they are)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def measured_statistics(
    folders: Sequence[str], weights: Sequence[float] = (1.0,)
) -> ChannelStatistics:
    """Read what was measured of these sets, and join it as a mixture of these weights.

    Raises:
        ValueError: a set was not measured, or the sets have different channels.
    """
    found = [_read(locate(folder) / STATISTICS_NAME, folder) for folder in folders]
    if len(found) == 1:
        return found[0]
    if len({len(one.mean) for one in found}) > 1:
        raise ValueError(
            f"the shards in {', '.join(folders)} have different numbers of channels:"
            " they cannot be mixed"
        )
    shares = np.asarray(weights, dtype=np.float64)[:, None] / float(np.sum(weights))
    means, stds = (np.array([getattr(one, name) for one in found]) for name in ("mean", "std"))
    mean = (shares * means).sum(axis=0)
    spread = np.sqrt(np.maximum((shares * (stds**2 + means**2)).sum(axis=0) - mean**2, 0))
    return ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(spread.tolist()))


def _read(path: Location, folder: str) -> ChannelStatistics:
    remedy = f"measure them with `data-prep info --statistics {folder}`, or write mean and std out"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(float(number) for number in values[name]) for name in ("mean", "std"))
    except FileNotFoundError:
        raise ValueError(f"mean and std of {folder} are not known: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used ({error}): {remedy}") from None
    if len(mean) != len(std) or not np.isfinite([*mean, *std]).all() or min(std, default=0) <= 0:
        raise ValueError(f"{path} has an impossible mean or std {mean}, {std}: {remedy}")
    return ChannelStatistics(mean=mean, std=std)
