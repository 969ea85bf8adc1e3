"""Settings of labelled clips."""

from simmim.data.bad_samples import MAX_BAD_SHARE, BadSamples
from simmim.data.clips import ClipSet, open_clips
from simmim.data.images import MAX_PIXELS
from simmim.data.settings import IMAGENET_MEAN, IMAGENET_STD
from simmim.recipe import settings

REMEDY = "Mend or leave out these clips"
"""What to do where too many clips are bad."""


@settings
class ClipData:
    """Labelled clips, which frames of them are seen, and how these are cropped."""

    clips: str
    """Folder with a folder of clips for each class, or a CSV file with a path and a label on each
    line. Which clips there are is looked up once, at the start."""
    validation: str | None = None
    """Another folder or CSV file, whose clips are held out; null validates nothing."""
    frames: int = 8
    """Frames of a clip that are seen: one of each of so many equal segments, drawn at random in
    training and from the middle in validation. A shorter clip shows some frames more than once."""
    image_size: int = 224
    """Side of the square frames in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of a frame's area that the random crop takes, from and to; all frames of a clip are
    cropped alike. Validation shows the largest square in the middle."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of the random crop, from and to."""
    flip: float = 0.5
    """Probability of mirroring a clip; 0 where left and right tell classes apart."""
    views: tuple[int, int] = (1, 1)
    """Views of each clip in validation, in time and in space, whose probabilities are averaged:
    figures named views_top1 and views_top5, beside those of the single view in the middle; 4 and 5
    in the paper. They cost as many forward passes."""
    workers: int = 2
    """Worker processes that decode, for each training process; 0 decodes in the process itself."""
    slots: int = 8
    """Equal parts that an epoch is cut into; the batch size must be a multiple of it, and the
    number of processes must divide it. Another number is another order."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, on a scale from 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, on the same scale."""
    max_pixels: int = MAX_PIXELS
    """Clips whose frames have more pixels are refused before anything is decoded."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of the clips that may be damaged: training replaces each by another of its class,
    validation leaves it out, both name it in bad_samples.jsonl. More of them end the run."""

    def __post_init__(self) -> None:
        for name in ("frames", "image_size", "slots", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if min(self.views) < 1:
            raise ValueError(f"views is {list(self.views)}; both must be 1 or more.")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 or more.")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}; a probability is between 0 and 1.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; from and to, above 0 and at most 1.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}; from and to, both above 0.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; a share is from 0 to 1.")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; every one must be above 0.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of frames, in pixels."""
        return self.image_size, self.image_size

    def open(self) -> tuple[ClipSet, ClipSet | None]:
        """List the clips for training, and those for validation.

        Raises:
            ValueError: there are none, of fewer than two classes, or of other ones in validation.
        """
        training = open_clips(self.clips)
        if len(training.classes) < 2:
            raise ValueError(
                f"all clips of {self.clips} are of the class {training.classes[0]!r}; "
                "classification needs two classes or more."
            )
        if self.validation is None:
            return training, None
        return training, open_clips(self.validation, classes=training.classes)

    def bad_samples(self) -> BadSamples:
        """Return a fresh account of bad clips."""
        return BadSamples(self.max_bad_share, remedy=REMEDY)
