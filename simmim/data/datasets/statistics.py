"""Mean and standard deviation of each channel, as `data-prep info --statistics` measured them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.format.manifest import read_manifest
from data_prep.format.statistics_file import read_statistics


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Of the pixels of a set, on a scale from 0 to 1 (fractions as they are)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def measured_statistics(
    folders: Sequence[str], weights: Sequence[float] = (1.0,), *, allow_pipe: bool = False
) -> ChannelStatistics:
    """Read what was measured of these sets, and join it as a mixture of these weights.

    Of a set with images of several kinds it is that of the most frequent kind.

    Raises:
        ValueError: a set was not measured, or the sets have different channels.
    """
    found = [_read(folder, allow_pipe) for folder in folders]
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


def _read(folder: str, allow_pipe: bool) -> ChannelStatistics:
    measured = read_statistics(read_manifest(folder, allow_pipe=allow_pipe))[0]
    if min(measured.std) <= 0:
        raise ValueError(
            f"a channel of the images in {folder} is the same everywhere, so that its measured"
            " standard deviation is 0: write mean and std out"
        )
    return ChannelStatistics(mean=measured.mean, std=measured.std)
