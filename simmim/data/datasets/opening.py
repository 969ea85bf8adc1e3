"""How recipes name datasets of images, opening them, and their measured statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np

from data_prep.bounds import Positive
from data_prep.channels import PICTURES, ChannelNameError, ChannelNames, choose
from data_prep.format.manifest import MANIFEST_NAME, describe_unfinished, read_manifest
from data_prep.format.patterns import Names, describe_splits
from data_prep.format.statistics_file import read_statistics
from data_prep.format.storage import Location, locate
from data_prep.format.text import WarnOnce
from simmim.data.datasets.folder import open_folder
from simmim.data.datasets.image_set import ImageSet
from simmim.data.datasets.mixture import MixedShards, Shards
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import ShardSet, set_of
from simmim.environment import process_environment
from simmim.recipe import settings

_warn = WarnOnce()


@settings
class WeightedShards:
    """One dataset of a mixture."""

    shards: str
    """Folder or URL of shards made by data-prep, a pattern of such shards, or a folder of images.
    """
    weight: Positive = 1.0
    """Sampling weight relative to the other datasets."""


ShardsSetting = str | tuple[WeightedShards, ...]
"""A folder, URL or pattern of shards, or a folder of images; or several with weights."""


def open_sets(
    shards: ShardsSetting, remote: RemoteReading | None = None, names: Names | None = None
) -> Shards:
    """Open shards or a folder of images, or a mixture of several.

    Args:
        shards: what to open.
        remote: how URLs are read.
        names: names of the shards to use, of each dataset.

    Raises:
        ValueError: a folder or pattern cannot be used.
    """
    folders = folders_of(shards)
    remote = replace(remote or RemoteReading(), sets=len(folders))
    if isinstance(shards, str):
        return open_set(shards, remote, names)
    return MixedShards([open_set(one, remote, names) for one in folders], weights_of(shards))


def open_set(folder: str | Path, remote: RemoteReading, names: Names | None = None) -> ImageSet:
    """Open a folder or pattern of shards, or a local folder of images.

    Raises:
        ValueError: it is neither, or cannot be used.
    """
    location = locate(folder)
    is_chosen = names is not None and bool(names.include or names.exclude)
    if is_image_folder(location):
        if is_chosen:
            raise ValueError(
                f"data.include and data.exclude choose shards by name, and {folder} is a folder of"
                f" images: make shards of those you want: data-prep shard {folder} DST --include …"
            )
        return open_folder(location, attempts=remote.attempts)
    shards = ShardSet(folder, remote=remote, names=names)
    if not is_chosen and shards.folder == location:
        _warn_of_splits(shards)
    return shards


def _warn_of_splits(shards: ShardSet) -> None:
    """Say that a set of someone else's shards, used whole, has several splits by their names."""
    manifest = shards.manifest
    splits = describe_splits(shard.name for shard in manifest.shards)
    if splits and "source" not in manifest.options and process_environment().is_main:
        _warn(
            f"the shards in {shards.folder} are of several splits, and all are used: {splits}."
            " Choose some with data.include or data.exclude, or by a pattern as in data.shards:"
            f" {shards.folder}/train-*.tar"
        )


def is_image_folder(location: Location) -> TypeGuard[Path]:
    """Return whether a location is a local folder without manifest, tars and unfinished shards."""
    if not isinstance(location, Path) or not location.is_dir() or describe_unfinished(location):
        return False
    return not (location / MANIFEST_NAME).exists() and next(location.glob("*.tar"), None) is None


def folders_of(shards: ShardsSetting) -> tuple[str, ...]:
    """Return the named folders and URLs, at least one."""
    return (shards,) if isinstance(shards, str) else tuple(one.shards for one in shards)


def weights_of(shards: ShardsSetting) -> Sequence[float]:
    """Return the weight of each folder."""
    return [1.0] if isinstance(shards, str) else [one.weight for one in shards]


def first_folder(shards: ShardsSetting) -> str:
    """Return the first folder or URL, from which an example image can be taken."""
    return folders_of(shards)[0]


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel; integer types are scaled to 0 … 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def measured_statistics(
    folders: Sequence[str],
    weights: Sequence[float] = (1.0,),
    *,
    read: Callable[[str], ChannelStatistics] | None = None,
) -> ChannelStatistics:
    """Return the statistics of datasets, pooled by weight.

    Args:
        folders: datasets, as a recipe names them.
        weights: their weights.
        read: returns the statistics of one; None takes `recorded_statistics`.

    Raises:
        ValueError: a dataset was not measured, or channel counts differ.
    """
    found = [(read or recorded_statistics)(folder) for folder in folders]
    if len(found) == 1:
        return found[0]
    if len({len(one.mean) for one in found}) > 1:
        raise ValueError(
            f"the shards in {', '.join(folders)} have different numbers of channels and cannot be"
            " mixed: choose shards with the same channels."
        )
    shares = np.asarray(weights, dtype=np.float64)[:, None] / float(np.sum(weights))
    means, stds = (np.array([getattr(one, name) for one in found]) for name in ("mean", "std"))
    mean = (shares * means).sum(axis=0)
    spread = np.sqrt(np.maximum((shares * (stds**2 + means**2)).sum(axis=0) - mean**2, 0))
    return ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(spread.tolist()))


def recorded_statistics(
    folder: str, *, allow_pipe: bool = False, channels: ChannelNames | None = None
) -> ChannelStatistics:
    """Read what `data-prep info --statistics` measured of a set of shards.

    If it has images of several types, those of the most frequent type are taken.

    Args:
        folder: the set, as a recipe names it.
        allow_pipe: see `read_manifest`.
        channels: the channels to take, by name; None: all, in stored order.

    Raises:
        ValueError: it was not measured, or lacks a channel, or one is constant.
    """
    place = set_of(locate(folder))[0]  # what is measured are all shards of a folder
    manifest = read_manifest(place, allow_pipe=allow_pipe)
    measured = read_statistics(manifest)[0]
    names = manifest.channels
    if names is None and not measured.is_array:
        names = PICTURES.get(measured.channels)
    try:
        choice = choose(names, channels)
    except ChannelNameError as error:
        raise ValueError(f"{folder}: {error}.") from None
    if choice is not None and choice.count == measured.channels:
        measured = replace(measured, mean=choice.of(measured.mean), std=choice.of(measured.std))
    if min(measured.std) <= 0:
        raise ValueError(
            f"a channel of the images in {folder} is constant, so its measured standard deviation"
            " is 0: set data.mean and data.std to numbers."
        )
    return ChannelStatistics(mean=measured.mean, std=measured.std)
