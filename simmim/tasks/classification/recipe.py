"""Recipe of image classification, and the base of all recipes with a linear head."""

from typing import Literal

from simmim.data.settings import AugmentedDataSettings
from simmim.data.transforms.settings import AugmentationSettings, MultiLabelSettings
from simmim.limits import check_rates, check_shares
from simmim.recipe import settings
from simmim.tasks.recipe import SCRATCH, FineTuningRecipe


@settings
class ClassifierRecipe(FineTuningRecipe):
    """A linear head on the encoder's average-pooled features, trained with it."""

    init: str = SCRATCH
    """`scratch`, or what to start from: an encoder directory, or the folder of a run that has
    ended. It brings its architecture (variant, patch, channels, sizes) and its mean and std: of
    `encoder` only `window_size` and `drop_path` then apply, and data.mean and data.std do not. A
    classification run, or its native export, brings its head too, where it knows all classes by
    the same names."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes, 0 to below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(self, "label_smoothing")

    @property
    def best_metric(self) -> str:
        """Share of samples whose class has the highest score."""
        return "top1"


@settings
class ClassificationData(AugmentedDataSettings):
    """Labelled shards and their augmentation."""

    image_size: int = 224
    """Side of the square images in pixels."""
    validation: str | None = None
    """Other shards, or folder of images, of the same classes, all of them for validation; null
    holds out `validation_shards`."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that the random crop takes, from and to."""
    multi_label: MultiLabelSettings | None = None
    """Where the classes of an image are listed that may have several, or none; null takes the one
    class of each that shards and folders know."""
    crop_pct: float = 0.875
    """Validation: share of the short side that the central crop keeps, above 0 and at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "crop_pct")
        if self.multi_label is not None and self.classes is not None:
            raise ValueError("classes picks images of one class each; multi_label has its own.")


@settings
class ClassificationRecipe(ClassifierRecipe):
    """Classification on a Swin Transformer V2, pretrained or from scratch."""

    task: Literal["classification"]
    data: ClassificationData
    """The images."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """What is done to the images besides crop and mirroring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        augmentation = self.augmentation
        channels = self.encoder.in_channels
        if (augmentation.rand_magnitude is not None or augmentation.color_jitter) and channels != 3:
            raise ValueError(
                f"augmentation.rand_magnitude and color_jitter are for images of 3 channels, and "
                f"encoder.in_channels is {channels}: leave them out."
            )

    @property
    def best_metric(self) -> str:
        """Top-1, or mean average precision where an image may have several classes."""
        return "top1" if self.data.multi_label is None else "mean_average_precision"

    @property
    def counted_mask_cell(self) -> int:
        """One cell as large as the image: a classifier needs as much memory as SimMIM."""
        return self.data.image_size
