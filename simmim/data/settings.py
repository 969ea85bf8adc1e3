"""Settings of the data that every stage reads."""

from pathlib import Path
from typing import Literal

from simmim.data.cache import DEFAULT_CACHE_BYTES
from simmim.data.images import MAX_PIXELS
from simmim.data.reading import ShardSet
from simmim.data.remote import RemoteReading
from simmim.recipe import settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@settings
class DataSettings:
    """Shards, and how they are read."""

    shards: str
    """Folder of shards that data-prep made: tars, indexes and manifest.json. Or its URL, of s3,
    gs, http or https."""
    remote: Literal["auto", "shards", "ranges"] = "auto"
    """How shards at a URL are read: `shards` fetches whole ones into a cache and checks them,
    `ranges` single samples; `auto` takes ranges where the cache is too small for the shuffle."""
    cache_dir: str | None = None
    """Folder of fetched shards, shared by the processes of a machine; null is one in the user's
    cache directory."""
    cache_bytes: int = DEFAULT_CACHE_BYTES
    """Most bytes of fetched shards that are kept."""
    attempts: int = 8
    """Times that a request to a store is made, with growing pauses, before the run ends."""
    validation_shards: int = 1
    """Shards at the end of the set that are held out for validation; 0 holds out none."""
    workers: int = 2
    """Worker processes that decode, for each training process; 0 decodes in the process itself."""
    slots: int = 64
    """Equal parts that an epoch is cut into; the batch size must be a multiple of it, and the
    number of processes must divide it. Another number is another order."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, on a scale from 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel, on a scale from 0 to 1."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are refused from their header, before anything is decoded."""

    def __post_init__(self) -> None:
        for name in ("validation_shards", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.cache_bytes < 1 or self.attempts < 1:
            raise ValueError("cache_bytes and attempts must be 1 or more.")
        if self.slots < 1 or self.max_pixels < 1:
            raise ValueError("slots and max_pixels must be 1 or more.")
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError("mean and std need a number a channel each, every std above 0.")

    def open_shards(self) -> ShardSet:
        """Open the shards.

        Raises:
            ValueError: there is no such folder, or no good manifest in it.
        """
        remote = RemoteReading(
            mode=self.remote,
            cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
            cache_bytes=self.cache_bytes,
            attempts=self.attempts,
            slots=self.slots,
        )
        return ShardSet(self.shards, remote=remote)


@settings
class AugmentedDataSettings(DataSettings):
    """Shards whose images are cropped and mirrored at random for training."""

    image_size: int
    """Side of the square images in pixels."""
    scale: tuple[float, float]
    """Share of the image's area that the random crop takes, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of the random crop, from and to."""
    flip: float = 0.5
    """Probability of mirroring an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be 1 or more.")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}; a probability is between 0 and 1.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; from and to, above 0 and at most 1.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}; from and to, both above 0.")
