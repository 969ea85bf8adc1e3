"""Settings of augmentation and of multi-label targets. Imports no torch."""

from simmim.limits import check_least, check_probabilities
from simmim.recipe import settings

MAX_LEVEL = 10.0
"""Highest level of a RandAugment operation."""


@settings
class AugmentationSettings:
    """What is done to labelled images besides crop and mirroring; by default nothing.

    Everything is a pure function of seed, epoch and sample: not of ranks or workers.
    """

    rand_magnitude: float | None = None
    """Mean level of RandAugment, 0 to 10, 9 in the papers; null does without. Needs images of 3
    channels of 8 bits."""
    rand_std: float = 0.5
    """Standard deviation of that level."""
    rand_operations: int = 2
    """Operations of RandAugment drawn for an image; each is done with probability 0.5."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation, 0.4 in the papers; 0 is off.
    As in the published code it is only done where RandAugment is not."""
    erasing: float = 0.0
    """Probability that a rectangle of the image is replaced by noise, 0.25 in the papers."""
    mixup: float = 0.0
    """Parameter of the beta distribution that the shares of two mixed images are drawn from, 0.8 in
    the papers; 0 is off."""
    cutmix: float = 0.0
    """The same for a rectangle that two images exchange, 1.0 in the papers; 0 is off."""
    mix_probability: float = 1.0
    """Probability that a pair of images is mixed at all, where mixup or cutmix is on."""
    mix_switch: float = 0.5
    """Probability of cutmix rather than mixup, where both are on."""

    def __post_init__(self) -> None:
        if self.rand_magnitude is not None and not 0 <= self.rand_magnitude <= MAX_LEVEL:
            raise ValueError(f"rand_magnitude is {self.rand_magnitude}; from 0 to 10, or null.")
        check_least(self, 0, "rand_std", "color_jitter", "mixup", "cutmix")
        check_probabilities(self, "erasing", "mix_probability", "mix_switch")
        if self.rand_operations < 1 or self.color_jitter > 1:
            raise ValueError("rand_operations must be 1 or more, color_jitter at most 1.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of their batch."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def touches_pictures(self) -> bool:
        """Whether single images are changed."""
        return self.rand_magnitude is not None or self.color_jitter > 0 or self.erasing > 0


@settings
class MultiLabelSettings:
    """Where the classes of an image are listed, if it may have several or none."""

    classes: tuple[str, ...]
    """Names of all classes, in order. Images list them by name, or by place from 0."""
    field: str = "labels"
    """Field of the JSON beside each image: a list, or a text with blanks, commas, semicolons or
    bars between. `data-prep shard LIST.csv` makes fields of a list's columns; in a folder of
    images, `x.json` stands beside `x.jpg`."""

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be names, at least one, and each once.")
