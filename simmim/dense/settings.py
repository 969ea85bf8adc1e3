"""Settings of data that the dense stages share."""

from simmim.data.bad_samples import MAX_BAD_SHARE
from simmim.data.images import MAX_PIXELS
from simmim.data.order import DEFAULT_SLOTS
from simmim.data.settings import IMAGENET_MEAN, IMAGENET_STD
from simmim.engine.settings import TrainingSettings
from simmim.recipe import settings


@settings
class DenseData:
    """Files of images, how they are read, scaled, cropped and mirrored."""

    fraction: float = 1.0
    """Share of the training images that is used, above 0; a larger one holds every smaller one."""
    fraction_seed: int = 0
    """Seed of that choice."""
    image_size: int
    """Side of the square crops that are trained on, pixels."""
    scale: tuple[float, float]
    """Factor of the image's size before the crop, from and to."""
    flip: float = 0.5
    """Probability of mirroring an image."""
    workers: int = 2
    """Worker processes that decode, for each training process; 0 decodes in the process itself."""
    slots: int = DEFAULT_SLOTS
    """Equal parts that an epoch is cut into; the batch size must be a multiple of it, and the
    number of processes must divide it."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, on a scale from 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel, on the same scale."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are refused from their header."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of the samples that may be damaged: training replaces each by another, validation
    leaves it out, both name it in bad_samples.jsonl. More of them end the run."""

    def __post_init__(self) -> None:
        for name in ("image_size", "slots", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; above 0, at most 1.")
        if not 0 <= self.flip <= 1 or not 0 <= self.max_bad_share <= 1:
            raise ValueError("flip and max_bad_share must be from 0 to 1.")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is {self.scale}; from and to, both above 0.")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 or more.")
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError("mean and std need a number a channel each, every std above 0.")


def check_slots(data: DenseData, training: TrainingSettings) -> None:
    """Raise ValueError unless a batch takes equally from each slot."""
    if training.batch_size % data.slots:
        raise ValueError(
            f"training.batch_size {training.batch_size} is no multiple of data.slots "
            f"{data.slots}; every batch takes equally from each slot. Change either."
        )
