"""Mean and standard deviation per channel, over every value of every image of a set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.executors.processes import Tick, map_tasks
from data_prep.format.index import ShardIndex, read_images, read_index
from data_prep.format.manifest import Manifest, ShardEntry
from data_prep.format.statistics_file import Statistics
from data_prep.format.storage import Location
from data_prep.format.tars import as_local_file
from data_prep.images.arrays import is_measured
from data_prep.images.checking import RejectedImageError, read_pixels
from data_prep.images.settings import read_limit
from data_prep.inspect.pixels import stored_form

_VALUES_PER_PART = 2**22


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and squared deviation per channel; every array has shape (channels,)."""

    count: NDArray[np.int64]
    """Number of values that are not NaN."""
    mean: NDArray[np.float64]
    """Their mean, 0 if there are none."""
    squares: NDArray[np.float64]
    """Sum of their squared deviations from the mean."""

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of values together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        shift = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + shift * share,
            squares=self.squares + other.squares + shift**2 * self.count * share,
        )


def measure_moments(values: NDArray[Any], no_data: float | None = None) -> Moments:
    """Return the moments of an array of shape (height, width, channels), without NaN.

    Integers are scaled to [0, 1]; floating-point values are used as they are.

    Args:
        values: the array.
        no_data: value that is left out of each channel, as it is stored; None for none.
    """
    rows = max(1, _VALUES_PER_PART // (values.shape[1] * values.shape[2]))
    parts = (values[row : row + rows] for row in range(0, len(values), rows))
    if values.dtype == np.uint8:
        bins = sum(map(_count_levels, parts), np.zeros((1, 256), dtype=np.int64))
        if no_data is not None and no_data in range(256):
            bins[:, int(no_data)] = 0
        return _moments_of_bins(bins)
    moments = _measure_part(next(parts), no_data)
    for part in parts:
        moments = moments.merged(_measure_part(part, no_data))
    return moments


def _count_levels(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    channels = np.moveaxis(values, -1, 0)
    return np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in channels])


def _moments_of_bins(bins: NDArray[np.int64]) -> Moments:
    levels = np.arange(256) / 255
    count = bins.sum(axis=1)
    mean = bins @ levels / np.maximum(count, 1)
    squares = (bins * (levels - mean[:, None]) ** 2).sum(axis=1)
    return Moments(count=count, mean=mean, squares=squares)


def _measure_part(values: NDArray[Any], no_data: float | None) -> Moments:
    scale = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1
    numbers = values.reshape(-1, values.shape[-1]).astype(np.float64) / scale
    known = np.isfinite(numbers) & is_measured(values, no_data).reshape(numbers.shape)
    count = known.sum(axis=0)
    mean = np.where(known, numbers, 0).sum(axis=0) / np.maximum(count, 1)
    squares = (np.where(known, numbers - mean, 0) ** 2).sum(axis=0)
    return Moments(count=count, mean=mean, squares=squares)


class _Kind(NamedTuple):
    """Images of one kind are measured together."""

    is_array: bool
    channels: int
    has_fractions: bool


@dataclass(kw_only=True)
class _Sum:
    moments: Moments
    images: int
    missing: int

    def add(self, other: "_Sum") -> None:
        self.moments = self.moments.merged(other.moments)
        self.images += other.images
        self.missing += other.missing


@dataclass(frozen=True, kw_only=True)
class _StatisticsTask:
    number: int
    folder: Location
    shard: ShardEntry
    max_pixels: int
    no_data: float | None


@dataclass(frozen=True, kw_only=True)
class _Measured:
    number: int
    sums: dict[_Kind, _Sum]
    unreadable: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SetStatistics:
    """Result of `measure_set`."""

    statistics: tuple[Statistics, ...]
    """Statistics per kind of image, the most frequent kind first."""
    unreadable: tuple[str, ...]
    """images that cannot be decoded, by shard and key."""


def measure_set(
    manifest: Manifest, *, workers: int = 1, tick: Tick = lambda _: None
) -> SetStatistics:
    """Compute mean and standard deviation over every value of every image at full size.

    Grey pictures count as three equal channels if other pictures of the set have colour. The result
    does not depend on the number of workers.

    Raises:
        ManifestError: an index is missing or does not fit.
        OSError: a shard cannot be read.
    """
    tasks = [
        _StatisticsTask(
            number=number,
            folder=manifest.folder,
            shard=shard,
            max_pixels=read_limit(manifest.options),
            no_data=manifest.no_data,
        )
        for number, shard in enumerate(manifest.shards)
    ]
    workers = max(1, min(workers, len(tasks)))
    found = sorted(
        map_tasks(_measure_shard, tasks, workers=workers, tick=tick), key=lambda one: one.number
    )
    sums: dict[_Kind, _Sum] = {}
    for one in found:
        _add_all(sums, one.sums)
    _merge_grey_into_colour(sums)
    ordered = sorted(sums.items(), key=lambda item: (-item[1].images, item[0]))
    return SetStatistics(
        statistics=tuple(_to_statistics(kind, total) for kind, total in ordered),
        unreadable=tuple(name for one in found for name in one.unreadable),
    )


def _measure_shard(task: _StatisticsTask, tick: Tick) -> _Measured:
    index = read_index(task.folder, task.shard)
    with as_local_file(task.shard.location(task.folder)) as path:
        images = read_images(path, index, np.arange(len(index)))
        return _measure_images(task, index, images, tick)


def _measure_images(
    task: _StatisticsTask, index: ShardIndex, images: Iterable[bytes], tick: Tick
) -> _Measured:
    sums: dict[_Kind, _Sum] = {}
    unreadable = []
    for row, found in enumerate(images):
        try:
            data, extension = stored_form(
                found, str(index.extensions[row]), max_pixels=task.max_pixels
            )
            values = read_pixels(data, extension, max_pixels=task.max_pixels)
        except RejectedImageError as error:
            unreadable.append(f"{task.shard.name}: image {index.keys[row]}: {error}")
        else:
            kind = _Kind(extension == "npy", values.shape[2], values.dtype.kind == "f")
            moments = measure_moments(values, task.no_data)
            missing = values.size - int(moments.count.sum())
            _add_all(sums, {kind: _Sum(moments=moments, images=1, missing=missing)})
        tick(1)
    return _Measured(number=task.number, sums=sums, unreadable=tuple(unreadable))


def _add_all(sums: dict[_Kind, _Sum], others: dict[_Kind, _Sum]) -> None:
    for kind, other in others.items():
        if kind in sums:
            sums[kind].add(other)
        else:
            sums[kind] = other


def _merge_grey_into_colour(sums: dict[_Kind, _Sum]) -> None:
    grey, colour = _Kind(False, 1, False), _Kind(False, 3, False)
    if grey in sums and colour in sums:
        total = sums.pop(grey)
        total.moments = Moments(
            count=total.moments.count.repeat(3),
            mean=total.moments.mean.repeat(3),
            squares=total.moments.squares.repeat(3),
        )
        sums[colour].add(total)


def _to_statistics(kind: _Kind, total: _Sum) -> Statistics:
    variance = total.moments.squares / np.maximum(total.moments.count, 1)
    return Statistics(
        images=total.images,
        is_array=kind.is_array,
        scale="as stored" if kind.has_fractions else "0 to 1",
        mean=tuple(total.moments.mean.tolist()),
        std=tuple(np.sqrt(variance).tolist()),
        missing=total.missing,
        values=tuple(total.moments.count.tolist()),
    )
