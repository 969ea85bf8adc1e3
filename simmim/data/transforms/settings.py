"""Settings of transforms: decoding, crops, augmentation, multi-label targets. Imports no torch.

Transforms hold these objects, and the data sections of recipes inherit them.
"""

from typing import Annotated

from data_prep.bounds import Amount, Bounds, Count, Fraction, Probability, Span
from data_prep.channels import ChannelNames, read_names
from simmim.recipe import settings

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded by default."""

MAX_LEVEL = 10.0
"""Highest level of a RandAugment operation."""


@settings
class DecodeSettings:
    """Decoding of images and clips."""

    max_pixels: Count = MAX_PIXELS
    """Largest image or frame, in pixels; larger ones are rejected before decoding."""
    channels: ChannelNames | None = None
    """Names of the channels to take, in this order, such as [red, green, blue, nir]: images whose
    channels have names are selected and reordered by them (`data-prep shard --channels` gives
    names; B1 to B12 are Sentinel-2's). null takes the channels as they are stored, and refuses sets
    and trained weights whose names differ. A run records the names in its recipe."""
    image_channels: ChannelNames | None = None
    """Names of the channels of files that do not name them, such as arrays in a folder, in stored
    order; null takes those of `channels`."""

    def __post_init__(self) -> None:
        for names in (self.channels, self.image_channels):
            if names is not None:
                read_names(names)

    @property
    def wanted_channels(self) -> ChannelNames | None:
        """Names of the channels to take, in their canonical form."""
        return None if self.channels is None else read_names(self.channels)

    @property
    def fallback_channels(self) -> ChannelNames | None:
        """Names of the channels of files that do not name them."""
        return None if self.image_channels is None else read_names(self.image_channels)


@settings
class CropSettings(DecodeSettings):
    """Square crops, which are mirrored at random in training."""

    image_size: Count
    """Side of the square input images in pixels."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.image_size, self.image_size


@settings
class RandomCropSettings(CropSettings):
    """Crops of random area and aspect ratio, resized to one size."""

    scale: Annotated[tuple[float, float], Span(most=1)]
    """Range of the random crop's area, as a fraction of the image's."""
    ratio: Annotated[tuple[float, float], Span()] = (3 / 4, 4 / 3)
    """Range of the random crop's aspect ratio (width / height)."""


@settings
class LabelMapSettings(DecodeSettings):
    """Label maps: images whose pixels are class numbers."""

    num_classes: Annotated[int, Bounds(ge=2, le=255)]  # of uint8, with 255 for no class
    """Number of classes; for a single class of interest the background is the other one."""
    ignore_label: int | None = 255
    """Number in the annotations for pixels without a class."""
    reduce_zero_label: bool = False
    """Whether 0 means no class and classes are numbered from 1, as in ADE20K."""


@settings
class SegmentationCropSettings(CropSettings):
    """Random scale, crop and distortion of images with label maps."""

    short_side: Count | None = None
    """Length in pixels that the short side is resized to, before the random scale and in
    validation; null keeps the image's size."""
    scale: Annotated[tuple[float, float], Span()] = (0.5, 2.0)
    """Range of the random scale factor before the crop."""
    largest_class: Fraction = 0.75
    """Maximum fraction of a crop that one class may have; up to ten crops are tried."""
    photometric: bool = True
    """Photometric distortion of brightness, contrast, saturation and hue, as in SSD."""


@settings
class DetectionCropSettings(CropSettings):
    """Random scale and crop of images with objects."""

    scale: Annotated[tuple[float, float], Span()] = (0.1, 2.0)
    """Large-scale jitter: range of the scale relative to the size at which an image just fits."""


@settings
class AugmentationSettings:
    """Augmentation of labelled images in addition to crop and flip; none by default.

    A pure function of seed, epoch and sample, independent of ranks and workers.
    """

    rand_magnitude: Annotated[float, Bounds(ge=0, le=MAX_LEVEL)] | None = None
    """Mean level of RandAugment (9 in the papers); null turns it off. Needs images of 3
    channels; those of 16 bits are rounded to 8, arrays must have 8."""
    rand_std: Amount = 0.5
    """Standard deviation of the RandAugment level."""
    rand_operations: Count = 2
    """RandAugment operations drawn per image; each is applied with probability 0.5."""
    color_jitter: Probability = 0.0
    """Largest relative change of brightness, contrast and saturation (0.4 in the papers); 0
    turns it off. As in the published code, ignored if RandAugment is on."""
    erasing: Probability = 0.0
    """Probability of replacing a random rectangle by noise (0.25 in the papers)."""
    mixup: Amount = 0.0
    """Mixup alpha: parameter of the beta distribution of mixing shares (0.8 in the papers); 0 turns
    it off."""
    cutmix: Amount = 0.0
    """CutMix alpha, for the area of the exchanged rectangle (1.0 in the papers); 0 turns it off."""
    mix_probability: Probability = 1.0
    """Probability of mixing a pair of images, if mixup or cutmix is on."""
    mix_switch: Probability = 0.5
    """Probability of cutmix rather than mixup, if both are on."""

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def changes_images(self) -> bool:
        """Whether single images are augmented."""
        return self.rand_magnitude is not None or self.color_jitter > 0 or self.erasing > 0


@settings
class MultiLabelSettings:
    """Multi-label classification: class names, and the JSON field that lists an image's classes."""

    classes: tuple[str, ...]
    """Names of all classes, in order. Images list them by name, or by index from 0."""
    field: str = "labels"
    """Field of each image's JSON file: a list, or a string separated by blanks, commas, semicolons
    or bars. `data-prep shard LIST.csv` writes the columns of a list as fields; in a folder of
    images, `x.json` belongs to `x.jpg`."""

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be one or more distinct names.")
