"""Settings of labelled clips."""

from simmim.data.datasets.clips import ClipSet, open_clips
from simmim.data.settings import IMAGENET_MEAN, IMAGENET_STD, CroppedSettings
from simmim.limits import check_least, check_shares, check_span
from simmim.recipe import settings


@settings
class ClipData(CroppedSettings):
    """Labelled clips, which frames of them are seen, and how these are cropped."""

    REMEDY = "Mend or leave out these clips"

    clips: str
    """Folder with a folder of clips for each class, or a CSV file with a path and a label on each
    line. Which clips there are is looked up once, at the start."""
    validation: str | None = None
    """Another folder or CSV file, whose clips are held out; null validates nothing."""
    fraction: float = 1.0
    """Share of each class's training clips that is used, above 0 and at most 1; a larger one holds
    every smaller one."""
    fraction_seed: int = 0
    """Seed of that choice."""
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
    slots: int = 8
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "frames")
        check_shares(self, "fraction")
        if min(self.views) < 1:
            raise ValueError(f"views is {list(self.views)}; both must be 1 or more.")
        check_span(self, "scale", most=1)
        check_span(self, "ratio")

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
        classes = training.classes
        if self.fraction < 1:
            training = training.share(self.fraction, seed=self.fraction_seed)
        if self.validation is None:
            return training, None
        return training, open_clips(self.validation, classes=classes)
