"""Recipe of a probe, and settings of the probe that runs during pretraining."""

from typing import Literal

from simmim.data.settings import RemoteSettings
from simmim.data.transforms.settings import MAX_PIXELS
from simmim.limits import check_least, check_shares
from simmim.recipe import settings


@settings
class ProbeData(RemoteSettings):
    """Labelled shards, and how they are read."""

    shards: str
    """Folder of labelled shards that data-prep made, or its URL; or of a folder of images for each
    class."""
    validation: str | None = None
    """Other images of the same classes, all of them for validation; null holds out
    `validation_shards`."""
    validation_shards: int = 1
    """Shards at the end of the set that are held out for validation."""
    fraction: float = 1.0
    """Share of each class's training images that is used, above 0 and at most 1."""
    fraction_seed: int = 0
    """Seed of that choice."""
    image_size: int | None = None
    """Side of the square images in pixels; null takes the encoder's."""
    window_size: int | None = None
    """Side of the attention windows in tokens; null takes the encoder's."""
    crop_pct: float = 1.0
    """Share of the short side that the central crop keeps, above 0 and at most 1."""
    batch_size: int = 128
    """Images that are encoded together."""
    workers: int = 2
    """Worker processes that decode; 0 decodes in the process itself."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are refused from their header, before anything is decoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation is None and self.validation_shards < 1:
            raise ValueError("a probe needs validation images: set validation_shards to 1 or more.")
        check_least(self, 1, "batch_size", "max_pixels")
        check_least(self, 0, "workers")
        check_shares(self, "fraction", "crop_pct")


@settings
class ProbeSettings:
    """Two classifiers on frozen features."""

    neighbours: int = 20
    """Nearest training images that vote on the class of an image."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine similarity / temperature)."""
    linear_steps: int = 100
    """Most L-BFGS steps over all training features for the linear classifier."""

    def __post_init__(self) -> None:
        check_least(self, 1, "neighbours", "linear_steps")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")


@settings
class ProbeRecipe:
    """A probe of an encoder's frozen features."""

    task: Literal["probe"] = "probe"
    """What this recipe does."""
    encoder: str
    """Encoder directory."""
    init: Literal["pretrained", "scratch", "both"] = "both"
    """Weights: the directory's, random ones in the same architecture, or one after the other."""
    seed: int = 0
    """Seed of the random weights."""
    data: ProbeData
    """The images."""
    probe: ProbeSettings = ProbeSettings()
    """The classifiers."""

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must fit into 64 bits.")


@settings
class OnlineProbeSettings:
    """A classifier on frozen features, to see if pretraining learns what classes are made of."""

    shards: str
    """Folder of labelled shards that data-prep made, or its URL; or of a folder of images for each
    class."""
    validation: str | None = None
    """Other images of the same classes, which are classified; null holds out
    `validation_shards`."""
    validation_shards: int = 1
    """Shards at the end of the set that are held out to be classified."""
    every: int = 5000
    """Steps between probes; there is one before training, of random weights, and one at the end."""
    kind: Literal["knn", "linear", "both"] = "knn"
    """knn: nearest neighbours vote; linear: a linear classifier is fitted; or both."""
    samples: int = 10_000
    """Most labelled images that are known, the same share of each class."""
    validation_samples: int = 5_000
    """Most images that are classified, the same share of each class."""
    batch_size: int = 256
    """Images that all processes together encode at a time."""
    classifier: ProbeSettings = ProbeSettings()
    """How they vote and how a line is fitted."""

    def __post_init__(self) -> None:
        if self.validation is None and self.validation_shards < 1:
            raise ValueError(
                "a probe needs images to classify: set validation_shards to 1 or more."
            )
        check_least(self, 1, "every", "samples", "validation_samples", "batch_size")
