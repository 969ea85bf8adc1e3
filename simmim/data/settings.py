"""Settings of the data that tasks read: images in shards or folders, and clips."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from data_prep.bounds import Bounds, Count, Fraction, Positive, Probability, Span, Whole
from data_prep.channels import RGB, describe, read_name
from data_prep.format.patterns import Names
from data_prep.format.storage import ATTEMPTS
from simmim.data.datasets.clips import ClipSet, open_clips
from simmim.data.datasets.mixture import Shards
from simmim.data.datasets.opening import (
    ChannelStatistics,
    ShardsSetting,
    first_folder,
    folders_of,
    measured_statistics,
    open_sets,
    recorded_statistics,
    weights_of,
)
from simmim.data.datasets.remote import DEFAULT_CACHE_BYTES, RemoteReading
from simmim.data.loader.bad_samples import MAX_BAD_SHARE, REMEDY, BadSamples
from simmim.data.order.order import MAX_SLOTS, Slots
from simmim.data.transforms.settings import CropSettings, DecodeSettings, RandomCropSettings
from simmim.recipe import settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MEASURED: Literal["measured"] = "measured"
MOST_WORKERS = 1000
"""Maximum number of data workers per training process: a slip of the finger starts no more."""


@settings
class RemoteSettings:
    """Reading of remote shards, and retries."""

    remote: Literal["auto", "shards", "ranges"] = "auto"
    """How shards at a URL are read: `shards` fetches and verifies whole shards in a cache, `ranges`
    fetches single samples, `auto` uses ranges if the cache is too small for the shuffle."""
    cache_dir: str | None = None
    """Cache folder of fetched shards, shared by the processes of a machine; null uses the user's
    cache directory."""
    cache_bytes: Count = DEFAULT_CACHE_BYTES
    """Size limit of the shard cache in bytes."""
    attempts: Count = ATTEMPTS
    """Attempts to read from a store, or a missing or truncated shard or folder, before the run
    stops; pauses grow from 0.1 s to 20 s: 13 s in total for 8 attempts, 20 s more for each further
    one. An attempt at a store fails after 30 s without a byte; on gs, whose library repeats it up
    to 6 times itself, later. Denied access is not retried, and a command is not timed."""
    allow_pipe: bool = False
    """Run the commands that a manifest lists instead of shards, as written by
    `data-prep index 'pipe:COMMAND' --allow-pipe`; their output is fetched whole."""

    @property
    def remote_reading(self) -> RemoteReading:
        """Options for reading remote shards sequentially."""
        return RemoteReading(
            mode=self.remote,
            cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
            cache_bytes=self.cache_bytes,
            attempts=self.attempts,
            allow_pipe=self.allow_pipe,
            slots=1,
        )


@settings
class SampleSettings(DecodeSettings):
    """Reading and ordering of samples, images or clips."""

    REMEDY: ClassVar[str] = REMEDY
    """Remedy named in the error about too many bad samples."""
    SMALLER: ClassVar[str] = "Smaller files load faster"
    """Advice where loading is slow."""
    MEASURABLE: ClassVar[bool] = False
    """Whether mean and std may be `measured`."""

    @classmethod
    def refused_values(cls) -> tuple[str, ...]:
        """Values in the types of its fields that it refuses, and which help does not show."""
        return () if cls.MEASURABLE else (MEASURED,)

    workers: Annotated[int, Bounds(ge=0, le=MOST_WORKERS)] = 2
    """Data worker processes per training process; 0 decodes in the training process itself."""
    UNRECORDED_SLOTS: ClassVar[int] = 64
    """Slots of a run whose recipe does not record them: the default of earlier versions."""
    slots: Slots | None = None
    """Number of equal parts of an epoch, from which every batch takes equally; the batch size must
    be a multiple of it. null shuffles sets of up to 65,536 samples as a whole, without leaving any
    out, and chooses the largest divisor of the batch size up to 64 for larger ones. A run records
    the number in its recipe, for a mixture of small and large sets one per set. Changing it changes
    the order of samples."""
    mean: tuple[float, ...] | Literal["measured"] = IMAGENET_MEAN
    """Mean of each channel, on a scale of 0 to 1."""
    std: tuple[Positive, ...] | Literal["measured"] = IMAGENET_STD
    """Standard deviation of each channel, on the same scale."""
    max_bad_share: Probability = MAX_BAD_SHARE
    """Maximum fraction of damaged samples; more stop the run. Training replaces a damaged
    sample by another from its shard (a clip by one of its class), validation skips it, and both
    list it in bad_samples.jsonl."""

    def __post_init__(self) -> None:
        if isinstance(self.mean, str) or isinstance(self.std, str):
            if not self.MEASURABLE:
                raise ValueError(
                    "mean and std are measured for pretraining and classification of images only: "
                    "give one number per channel, or start from trained weights (--init), which "
                    "bring their own."
                )
            return
        if len(self.mean) != len(self.std) or not self.std:
            raise ValueError("mean and std need one number per channel.")

    @property
    def slots_of_sets(self) -> tuple[int, ...]:
        """Numbers of slots, one for all datasets or one for each; empty if not chosen yet."""
        return (self.slots,) if isinstance(self.slots, int) else self.slots or ()

    @property
    def first_shards(self) -> str | None:
        """The first folder of images that can be opened without labels; None for other data."""
        return None

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std as numbers, as `with_statistics` leaves them."""
        assert not isinstance(self.mean, str)
        assert not isinstance(self.std, str)
        return self.mean, self.std

    def bad_samples(self) -> BadSamples:
        """Return a new counter of bad samples."""
        return BadSamples(self.max_bad_share, remedy=self.REMEDY)


@settings
class CroppedSettings(SampleSettings, CropSettings):
    """Samples cropped to squares, and mirrored at random in training."""


@settings
class DrawnSettings(SampleSettings):
    """Images of which pictures are drawn."""

    picture_bands: tuple[Whole | str, ...] | None = None
    """Channels that pictures show in red, green and blue, by name or counted from 0; one is shown
    in grey. null shows red, green and blue if the channels have these names, else the first three,
    or the first of one or two. Images of more than 8 bits are stretched from the 1st to the 99th
    percentile of each channel."""

    def __post_init__(self) -> None:
        bands = (0,) if self.picture_bands is None else self.picture_bands
        for name in bands:
            if isinstance(name, str):
                read_name(name)
        if len(bands) not in (1, 3):
            raise ValueError(
                f"picture_bands is {list(bands)}; give three channels for red, green and blue or "
                "one for grey, by name or number."
            )

    def check_bands(self, channels: int) -> None:
        """Raise ValueError unless the encoder's images have the channels that pictures show.

        Names are compared once the images have some.
        """
        bands, names = self.picture_bands or (0,), self.wanted_channels
        missing = [
            band
            for band in bands
            if (band >= channels if isinstance(band, int) else read_name(band) not in (names or ()))
        ]
        if not missing or (names is None and all(isinstance(band, str) for band in missing)):
            return
        have = f"{channels} channels, counted from 0"
        have = have if names is None else f"{have}: {describe(names)}"
        raise ValueError(
            f"data.picture_bands is {list(bands)}, and the images have {have}: choose among these."
        )

    @property
    def drawn_bands(self) -> tuple[int, ...] | None:
        """Numbers of the channels that pictures show; None are the first three.

        Raises:
            ValueError: they are given by name, and the channels have no names.
        """
        names = self.wanted_channels
        if self.picture_bands is None:
            has_colours = names is not None and set(RGB) <= set(names)
            return tuple(map((names or RGB).index, RGB)) if has_colours else None
        if names is None and any(isinstance(band, str) for band in self.picture_bands):
            raise ValueError(
                f"data.picture_bands is {list(self.picture_bands)}, and the channels of the images "
                "have no names: name them in data.channels, or count them from 0."
            )
        return tuple(
            band if isinstance(band, int) else (names or ()).index(read_name(band))
            for band in self.picture_bands
        )


@settings
class DataSettings(RemoteSettings, SampleSettings):
    """Images in shards or folders, and how they are read."""

    SMALLER: ClassVar[str] = "Smaller images load faster: `data-prep shard --short-side`"
    REFUSED: ClassVar[dict[str, str]] = {
        "stream": "only pretraining reads tars without a manifest, as labels need one; make it "
        "with `data-prep index TARS --output FOLDER`, and name FOLDER as data.shards"
    }
    """Fields that other recipes have, with the remedy."""
    MEASURABLE: ClassVar[bool] = True
    shards: ShardsSetting
    """Folder of shards made by data-prep (tars, indexes and manifest.json), or its URL (s3, gs,
    http or https); or a pattern of shards in it, `DIR/train-{000..099}.tar` or `DIR/train-*.tar`;
    or a local folder of images, with one subfolder per class if there are classes; or a list of
    {shards: any of these, weight: number}, from which every batch samples in proportion."""
    include: str | tuple[str, ...] = ()
    """Pattern of the names of the shards to use, `train-*.tar` or `train-{000..099}.tar`, or a list
    of patterns; empty uses all of the manifest."""
    exclude: str | tuple[str, ...] = ()
    """Pattern of the names of shards to leave out, or a list of patterns."""
    validation_shards: Whole = 1
    """Number of shards at the end of each dataset held out for validation. A folder of images is
    divided into random shards of at most 1,000 images."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to use; null uses all images."""
    fraction: Fraction = 1.0
    """Fraction of each class's training images to use. The choice depends
    only on `fraction_seed`, and a larger fraction contains every smaller one."""
    fraction_seed: int = 0
    """Seed of that choice; separate from training.seed, so that runs with other seeds share it."""
    mean: tuple[float, ...] | Literal["measured"] = IMAGENET_MEAN
    """Mean of each channel, on a scale of 0 to 1 (floating point values unscaled). `measured` uses
    the result of `data-prep info --statistics`, or measures up to 1,000 images of a folder at the
    start, for data.std as well unless that is given."""
    std: tuple[Positive, ...] | Literal["measured"] = IMAGENET_STD
    """Standard deviation of each channel, on the same scale, or `measured`."""

    def __post_init__(self) -> None:
        self.check_sources()

    def check_sources(self) -> None:
        """Raise ValueError unless there are images to train on."""
        if not self.shards:
            raise ValueError("shards is empty; give a folder, or a list of them.")

    def open_shards(self) -> Shards:
        """Open the datasets and select the images of `classes`.

        Raises:
            ValueError: no such folder, no valid manifest in it, or no such class.
        """
        include, exclude = (
            (one,) if isinstance(one, str) else one for one in (self.include, self.exclude)
        )
        names = Names(include=include, exclude=exclude)
        shards = open_sets(self.shards, self.remote_reading, names)
        return shards if self.classes is None else shards.only_classes(self.classes)

    @property
    def remote_reading(self) -> RemoteReading:
        """Options for reading remote shards in the shuffled order of an epoch."""
        return replace(super().remote_reading, slots=max(self.slots_of_sets, default=MAX_SLOTS))

    @property
    def first_shards(self) -> str | None:
        """The first folder of shards or images; None if there is only a stream."""
        return first_folder(self.shards) if self.shards else None

    def split_shards(self) -> tuple[Shards, Shards]:
        """Open the datasets and return (training, validation); see `open_shards`."""
        training, validation = self.open_shards().split(self.validation_shards)
        if self.fraction < 1:
            training = training.share(self.fraction, seed=self.fraction_seed)
        return training, validation


Data = TypeVar("Data", bound=DataSettings)


def with_statistics(data: Data, read: Callable[[str], ChannelStatistics] | None = None) -> Data:
    """Return the settings with `measured` mean and std replaced by numbers.

    If one of them is `measured` and the other is the default, both are.

    Args:
        data: the settings.
        read: returns the statistics of one dataset; None reads those recorded of shards.

    Raises:
        ValueError: the shards were not measured.
    """
    if MEASURED not in (data.mean, data.std):
        return data
    read = read or partial(
        recorded_statistics, allow_pipe=data.allow_pipe, channels=data.wanted_channels
    )
    found = measured_statistics(folders_of(data.shards), weights_of(data.shards), read=read)
    mean = found.mean if data.mean in (MEASURED, IMAGENET_MEAN) else data.mean
    std = found.std if data.std in (MEASURED, IMAGENET_STD) else data.std
    return replace(data, mean=mean, std=std)


def follows_images(data: SampleSettings) -> bool:
    """Return whether both mean and std are measured; see `with_statistics`."""
    return (
        MEASURED in (data.mean, data.std)
        and data.mean in (MEASURED, IMAGENET_MEAN)
        and data.std in (MEASURED, IMAGENET_STD)
    )


@settings
class AugmentedDataSettings(DataSettings, CroppedSettings, RandomCropSettings):
    """Images that are cropped and mirrored at random in training."""

    validation: str | None = None
    """Separate images to validate on, shards or a folder; null holds out `validation_shards`."""

    def split_shards(self) -> tuple[Shards, Shards]:
        """Open the datasets and return (training, validation); see `open_shards`."""
        if self.validation is None:
            return super().split_shards()
        training, _ = replace(self, validation=None, validation_shards=0).split_shards()
        return training, self.open_validation(self.validation)

    def open_validation(self, validation: str) -> Shards:
        """Open separate validation images, and select those of `classes` if they have classes."""
        held_out = open_sets(validation, self.remote_reading)
        chosen = self.classes if held_out.classes else None
        return held_out if chosen is None else held_out.only_classes(chosen)


@settings
class ClipDataSettings(CroppedSettings, RandomCropSettings):
    """Labelled clips, the frames sampled from them, and their crops."""

    REMEDY = "Repair or remove these clips"

    clips: str
    """Folder with one subfolder of clips per class, or a CSV file with a path and a label per line.
    Listed once, at the start."""
    validation: str | None = None
    """Folder or CSV file of the validation clips; null skips validation."""
    fraction: Fraction = 1.0
    """Fraction of each class's training clips to use, above 0 and at most 1; a larger fraction
    contains every smaller one."""
    fraction_seed: int = 0
    """Seed of that choice."""
    frames: Count = 8
    """Number of frames per clip, one from each of as many equal segments: random in training, the
    middle one in validation. Shorter clips repeat frames."""
    image_size: Count = 224
    """Side of the square frames in pixels."""
    scale: Annotated[tuple[float, float], Span(most=1)] = (0.08, 1.0)
    """Range of the random crop's area, as a fraction of the frame's; the same crop for all frames
    of a clip. Validation uses the largest central square."""
    flip: Probability = 0.5
    """Probability of a horizontal flip; use 0 if classes differ by left and right."""
    views: tuple[Count, Count] = (1, 1)
    """Validation views per clip (temporal, spatial), whose probabilities are averaged into
    views_top1 and views_top5, in addition to the single central view; [4, 5] in the paper. Each
    view costs a forward pass."""
    UNRECORDED_SLOTS: ClassVar[int] = 8
    mean: tuple[float, float, float] | Literal["measured"] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] | Literal["measured"] = IMAGENET_STD

    def __post_init__(self) -> None:
        mean, std = self.normalisation
        if self.wanted_channels not in (None, RGB) or self.image_channels is not None:
            given = describe(self.wanted_channels or self.fallback_channels)
            raise ValueError(
                f"clips have channels {describe(RGB)}, and data.channels are {given}: set it to "
                "those (encoder.adapt_channels adapts weights of others), or start from another "
                "encoder."
            )
        if max(*mean, *std) > 1:
            raise ValueError(
                f"mean is {list(mean)} and std {list(std)}; both are on a scale of 0 to "
                "1: divide values from 0 to 255 by 255."
            )

    def open(self) -> tuple[ClipSet, ClipSet | None]:
        """List the training clips and the validation clips.

        Raises:
            ValueError: no clips, fewer than two classes, or other classes in validation.
        """
        training = open_clips(self.clips)
        if len(training.classes) < 2:
            raise ValueError(
                f"all clips of {self.clips} are of the class {training.classes[0]!r}; "
                "classification needs at least 2 classes."
            )
        classes = training.classes
        if self.fraction < 1:
            training = training.share(self.fraction, seed=self.fraction_seed)
        if self.validation is None:
            return training, None
        return training, open_clips(self.validation, classes=classes)
