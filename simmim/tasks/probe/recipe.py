"""Recipe of `simmim probe`, and settings of the online probe during pretraining."""

from typing import Literal

from data_prep.bounds import Count, Fraction, Positive, Seed, Whole
from simmim.data.settings import RemoteSettings
from simmim.data.transforms.settings import DecodeSettings
from simmim.recipe import settings


@settings
class ProbeData(RemoteSettings, DecodeSettings):
    """Labelled shards, and how they are read."""

    shards: str
    """Folder of labelled shards made by data-prep, or its URL; or a folder with a folder of images
    per class."""
    validation: str | None = None
    """Separate validation shards, a folder or a pattern, with the same classes; null holds out
    `validation_shards`."""
    validation_shards: Whole = 1
    """Number of shards at the end of the set that are held out for validation."""
    fraction: Fraction = 1.0
    """Fraction of each class's training images to use, above 0 and at most 1."""
    fraction_seed: int = 0
    """Seed of that choice."""
    image_size: Count | None = None
    """Side of the square images in pixels; null is the encoder's."""
    window_size: Count | None = None
    """Side of the attention windows in tokens; null is the encoder's."""
    crop_pct: Fraction = 1.0
    """Fraction of the short side that the central crop keeps, above 0 and at most 1."""
    batch_size: Count = 128
    """Batch size of the encoder."""
    workers: Whole = 2
    """Worker processes that decode; 0 decodes in the main process."""

    def __post_init__(self) -> None:
        if self.validation is None and self.validation_shards < 1:
            raise ValueError("a probe needs validation images: set validation_shards to 1 or more.")


@settings
class ProbeSettings:
    """k-nearest-neighbour and linear classifiers on frozen features."""

    neighbours: Count = 20
    """kNN: number of nearest training images that vote."""
    temperature: Positive = 0.07
    """kNN: a neighbour's vote has weight exp(cosine similarity / temperature)."""
    linear_steps: Count = 100
    """Linear classifier: maximum number of L-BFGS steps over all training features."""


@settings
class ProbeRecipe:
    """Evaluation of an encoder's frozen features."""

    task: Literal["probe"] = "probe"
    """Task of the recipe."""
    encoder: str
    """Encoder directory, or the folder of a finished run."""
    init: Literal["pretrained", "scratch", "both"] = "both"
    """Weights: the directory's, random ones in the same architecture, or both in turn."""
    seed: Seed = 0
    """Seed of the random weights."""
    data: ProbeData
    """The images."""
    probe: ProbeSettings = ProbeSettings()
    """The classifiers."""


@settings
class OnlineProbeSettings:
    """Evaluation of frozen features on labelled images during pretraining."""

    shards: str
    """Folder of labelled shards made by data-prep, or its URL; or a folder with a folder of images
    per class."""
    validation: str | None = None
    """Separate validation shards, a folder or a pattern, with the same classes; null holds out
    `validation_shards`."""
    validation_shards: Whole = 1
    """Number of shards at the end of the set that are held out for validation."""
    every: Count = 5000
    """Steps between probes; there is also one of the random weights and one at the end."""
    kind: Literal["knn", "linear", "both"] = "knn"
    """k-nearest neighbours, a linear classifier, or both."""
    samples: Count = 10_000
    """Maximum number of training images, the same fraction of each class."""
    validation_samples: Count = 5_000
    """Maximum number of validation images, the same fraction of each class."""
    batch_size: Count = 256
    """Batch size of the encoder, over all processes."""
    classifier: ProbeSettings = ProbeSettings()
    """The classifiers."""

    def __post_init__(self) -> None:
        if self.validation is None and self.validation_shards < 1:
            raise ValueError(
                "a probe needs images to classify: set validation_shards to 1 or more."
            )
