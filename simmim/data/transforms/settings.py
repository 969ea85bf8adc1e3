"""Settings of augmentation and of multi-label targets, and the largest image. Imports no torch."""

from simmim.recipe import check_least, check_probabilities, settings

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded by default."""

MAX_LEVEL = 10.0
"""Highest level of a RandAugment operation."""


@settings
class AugmentationSettings:
    """Augmentation of labelled images in addition to crop and flip; none by default.

    A pure function of seed, epoch and sample, independent of ranks and workers.
    """

    rand_magnitude: float | None = None
    """Mean level of RandAugment, 0 to 10 (9 in the papers); null turns it off. Needs images of 3
    channels; those of 16 bits are rounded to 8, arrays must have 8."""
    rand_std: float = 0.5
    """Standard deviation of the RandAugment level."""
    rand_operations: int = 2
    """RandAugment operations drawn per image; each is applied with probability 0.5."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation, 0 to 1 (0.4 in the papers); 0
    turns it off. As in the published code, ignored if RandAugment is on."""
    erasing: float = 0.0
    """Probability of replacing a random rectangle by noise (0.25 in the papers)."""
    mixup: float = 0.0
    """Mixup alpha: parameter of the beta distribution of mixing shares (0.8 in the papers); 0 turns
    it off."""
    cutmix: float = 0.0
    """CutMix alpha, for the area of the exchanged rectangle (1.0 in the papers); 0 turns it off."""
    mix_probability: float = 1.0
    """Probability of mixing a pair of images, if mixup or cutmix is on."""
    mix_switch: float = 0.5
    """Probability of cutmix rather than mixup, if both are on."""

    def __post_init__(self) -> None:
        if self.rand_magnitude is not None and not 0 <= self.rand_magnitude <= MAX_LEVEL:
            raise ValueError(
                f"rand_magnitude is {self.rand_magnitude}; it must be from 0 to 10, or null."
            )
        check_least(self, 0, "rand_std", "color_jitter", "mixup", "cutmix")
        check_probabilities(self, "erasing", "mix_probability", "mix_switch")
        if self.rand_operations < 1 or self.color_jitter > 1:
            raise ValueError("rand_operations must be at least 1, and color_jitter at most 1.")

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
