"""Settings of the data that every stage reads."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, TypeGuard, TypeVar

from data_prep.format.manifest import MANIFEST_NAME
from data_prep.format.storage import Location, locate
from simmim.data.datasets.cache import DEFAULT_CACHE_BYTES
from simmim.data.datasets.folder import open_folder
from simmim.data.datasets.mixture import MixedShards, Shards
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.samples import SampleSet
from simmim.data.datasets.shards import ShardSet
from simmim.data.datasets.statistics import measured_statistics
from simmim.data.loader.bad_samples import MAX_BAD_SHARE, REMEDY, BadSamples
from simmim.data.order.order import DEFAULT_SLOTS
from simmim.data.transforms.pillow_decoding import MAX_PIXELS
from simmim.limits import check_least, check_probabilities, check_shares, check_span
from simmim.recipe import settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MEASURED: Literal["measured"] = "measured"


@settings
class WeightedShards:
    """One set of a mixture."""

    shards: str
    """Folder of shards that data-prep made, or its URL; or a folder of images."""
    weight: float = 1.0
    """Share of the samples that come from this set, to those of the others."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; it must be above 0.")


ShardsSetting = str | tuple[WeightedShards, ...]
"""A folder of shards or its URL, or a folder of images; or several with weights."""


@settings
class RemoteSettings:
    """How shards are read that are not on this machine, and how long files are waited for."""

    remote: Literal["auto", "shards", "ranges"] = "auto"
    """How shards at a URL are read: `shards` fetches whole ones into a cache and checks them,
    `ranges` single samples; `auto` takes ranges where the cache is too small for the shuffle."""
    cache_dir: str | None = None
    """Folder of fetched shards, shared by the processes of a machine; null is one in the user's
    cache directory."""
    cache_bytes: int = DEFAULT_CACHE_BYTES
    """Most bytes of fetched shards that are kept."""
    attempts: int = 8
    """Times that a request to a store, or a shard or folder that is gone or cut off, is tried
    before the run ends; the pauses grow from 0.1 s to 20 s, 13 s in all for 8."""
    allow_pipe: bool = False
    """Whether the commands are run that a manifest names in the place of shards, as
    `data-prep index 'pipe:COMMAND' --allow-pipe` writes it; what they write is fetched whole."""

    def __post_init__(self) -> None:
        check_least(self, 1, "cache_bytes", "attempts")

    @property
    def remote_reading(self) -> RemoteReading:
        """How shards that are not here are read, one after the other."""
        return RemoteReading(
            mode=self.remote,
            cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
            cache_bytes=self.cache_bytes,
            attempts=self.attempts,
            allow_pipe=self.allow_pipe,
            slots=1,
        )


@settings
class SampleSettings:
    """How samples are read and ordered, whatever they are."""

    REMEDY: ClassVar[str] = REMEDY
    """What to do where too many of them are bad."""
    workers: int = 2
    """Worker processes that decode, for each training process; 0 decodes in the process itself."""
    slots: int = DEFAULT_SLOTS
    """Equal parts that an epoch is cut into; the batch size must be a multiple of it, and the
    number of processes must divide it. Another number is another order."""
    mean: tuple[float, ...] | Literal["measured"] = IMAGENET_MEAN
    """Mean of each channel, on a scale from 0 to 1."""
    std: tuple[float, ...] | Literal["measured"] = IMAGENET_STD
    """Standard deviation of each channel, on the same scale."""
    max_pixels: int = MAX_PIXELS
    """Images or frames of more pixels are refused from their header, before they are decoded."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of the samples that may be damaged: training replaces each by another of its shard (a
    clip by one of its class), validation leaves it out, both name it in bad_samples.jsonl. More of
    them end the run."""

    def __post_init__(self) -> None:
        check_least(self, 0, "workers")
        check_least(self, 1, "slots", "max_pixels")
        check_probabilities(self, "max_bad_share")
        if isinstance(self.mean, str) or isinstance(self.std, str):
            return
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError("mean and std need a number a channel each, every std above 0.")

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std as numbers; `with_statistics` makes them such."""
        assert not isinstance(self.mean, str)
        assert not isinstance(self.std, str)
        return self.mean, self.std

    def bad_samples(self) -> BadSamples:
        """Return a fresh account of bad samples."""
        return BadSamples(self.max_bad_share, remedy=self.REMEDY)


@settings
class CroppedSettings(SampleSettings):
    """Samples that are cropped to squares, and mirrored at random for training."""

    image_size: int
    """Side of the square images in pixels."""
    flip: float = 0.5
    """Probability of mirroring an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "image_size")
        check_probabilities(self, "flip")


@settings
class DataSettings(RemoteSettings, SampleSettings):
    """Images in shards or folders, and how they are read."""

    shards: ShardsSetting
    """Folder of shards that data-prep made: tars, indexes and manifest.json. Or its URL, of s3,
    gs, http or https. Or a folder of images on this machine, with a folder for each class where
    there are classes. Or a list of {shards: any of these, weight: number}: every batch takes from
    each set in proportion."""
    validation_shards: int = 1
    """Shards at the end of each set that are held out for validation; 0 holds out none. A folder
    of images counts as shards of at most 1,000, drawn from all of it."""
    classes: tuple[str, ...] | None = None
    """Names of the classes whose images are used; null uses all images."""
    fraction: float = 1.0
    """Share of each class's training images that is used, above 0 and at most 1. Which ones
    depends on `fraction_seed` alone, and a larger share contains every smaller one."""
    fraction_seed: int = 0
    """Seed of that choice; apart from training.seed, so that runs of other seeds see the same."""
    mean: tuple[float, ...] | Literal["measured"] = IMAGENET_MEAN
    """Mean of each channel, on a scale from 0 to 1 (fractions as they are). `measured` takes what
    `data-prep info --statistics` found in the shards."""
    std: tuple[float, ...] | Literal["measured"] = IMAGENET_STD
    """Standard deviation of each channel, on the same scale, or `measured`."""

    def __post_init__(self) -> None:
        RemoteSettings.__post_init__(self)
        SampleSettings.__post_init__(self)
        check_least(self, 0, "validation_shards")
        check_shares(self, "fraction")
        if not self.shards:
            raise ValueError("shards names no folder; give one, or a list of them.")

    def open_shards(self) -> Shards:
        """Open the shards, and keep the images of the classes asked for.

        Raises:
            ValueError: there is no such folder, no good manifest in it, or no such class.
        """
        shards = open_sets(self.shards, self.remote_reading)
        return shards if self.classes is None else shards.only_classes(self.classes)

    @property
    def remote_reading(self) -> RemoteReading:
        """How shards that are not here are read, shuffled as an epoch is."""
        return replace(super().remote_reading, slots=self.slots)

    def split_shards(self) -> tuple[Shards, Shards]:
        """Open the shards and return (training, validation); see `open_shards`."""
        training, validation = self.open_shards().split(self.validation_shards)
        if self.fraction < 1:
            training = training.share(self.fraction, seed=self.fraction_seed)
        return training, validation


Data = TypeVar("Data", bound=DataSettings)


def with_statistics(data: Data) -> Data:
    """Put the measured numbers in place where `mean` or `std` ask for them.

    Raises:
        ValueError: they were not measured.
    """
    if MEASURED not in (data.mean, data.std):
        return data
    for folder in folders_of(data.shards):
        if holds_images(locate(folder)):
            raise ValueError(
                f"data.mean and data.std are measured of shards, and {folder} is a folder of"
                f" images: write numbers out, or make shards: data-prep shard {folder} DST, then"
                " data-prep info DST --statistics"
            )
    found = measured_statistics(
        folders_of(data.shards), weights_of(data.shards), allow_pipe=data.allow_pipe
    )
    mean = found.mean if isinstance(data.mean, str) else data.mean
    std = found.std if isinstance(data.std, str) else data.std
    return replace(data, mean=mean, std=std)


def open_sets(shards: ShardsSetting, remote: RemoteReading | None = None) -> Shards:
    """Open shards or a folder of images, or several as a mixture; URLs are read as `remote` says.

    Raises:
        ValueError: a folder cannot be used.
    """
    folders = folders_of(shards)
    remote = replace(remote or RemoteReading(), sets=len(folders))
    if isinstance(shards, str):
        return open_set(shards, remote)
    return MixedShards([open_set(one, remote) for one in folders], weights_of(shards))


def open_set(folder: str | Path, remote: RemoteReading) -> SampleSet:
    """Open a folder of shards, or one of images on this machine.

    Raises:
        ValueError: it is neither, or cannot be used.
    """
    place = locate(folder)
    if holds_images(place):
        return open_folder(place, attempts=remote.attempts)
    return ShardSet(folder, remote=remote)


def holds_images(place: Location) -> TypeGuard[Path]:
    """Tell whether a place is a folder that is no set of shards, nor was meant to be one."""
    if not isinstance(place, Path) or not place.is_dir():
        return False
    return not (place / MANIFEST_NAME).exists() and next(place.glob("*.tar"), None) is None


def folders_of(shards: ShardsSetting) -> tuple[str, ...]:
    """Return the folders and URLs that are named, at least one."""
    return (shards,) if isinstance(shards, str) else tuple(one.shards for one in shards)


def weights_of(shards: ShardsSetting) -> Sequence[float]:
    """Return the weight of each folder."""
    return [1.0] if isinstance(shards, str) else [one.weight for one in shards]


def first_folder(shards: ShardsSetting) -> str:
    """Return the first folder or URL that is named: where an example may be taken from."""
    return folders_of(shards)[0]


@settings
class AugmentedDataSettings(DataSettings, CroppedSettings):
    """Shards whose images are cropped and mirrored at random for training."""

    scale: tuple[float, float]
    """Share of the image's area that the random crop takes, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of the random crop, from and to."""

    def __post_init__(self) -> None:
        DataSettings.__post_init__(self)
        CroppedSettings.__post_init__(self)
        check_span(self, "scale", most=1)
        check_span(self, "ratio")
