"""Recipe of image classification, and the base of all recipes with a linear head."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from data_prep.bounds import Count, Fraction, Rate, Span
from simmim.data.settings import AugmentedDataSettings
from simmim.data.transforms.settings import AugmentationSettings, MultiLabelSettings
from simmim.method.settings import LossSettings
from simmim.method.strategies import MaskSettings
from simmim.recipe import settings
from simmim.tasks.recipe import HEAD_FOLDER, SCRATCH, FineTuningRecipe


@settings
class ClassifierRecipe(FineTuningRecipe):
    """A linear head on the encoder's average-pooled features, trained with it."""

    HEAD: ClassVar[str] = HEAD_FOLDER
    init: str = SCRATCH
    """`scratch` for random weights, an encoder directory, or the folder of a finished run. Trained
    weights come with their architecture (variant, patch, channels, sizes), mean and std: then only
    `window_size` and `drop_path` of `encoder` apply, which may be left out, and data.mean and
    data.std do not; the recipe in the run records what was trained. For the head see
    `init_head`."""
    init_head: bool | None = None
    """Whether to start from the head of `init` too, of a classification run or its native export;
    null takes it if it has all classes by name, true requires that, false starts a random head."""
    label_smoothing: Rate = 0.1
    """Label smoothing: fraction of the target spread evenly over all classes, 0 to below 1."""

    @classmethod
    def without_head(cls, init: str) -> dict[str, str]:
        """Return the overrides that leave out the head of `init`; see `FineTuningRecipe`."""
        return {"init_head": "false"} if (Path(init) / HEAD_FOLDER).is_dir() else {}

    @property
    def best_metric(self) -> str:
        """Top-1 accuracy."""
        return "top1"


@settings
class ClassificationData(AugmentedDataSettings):
    """Labelled shards and their augmentation."""

    image_size: Count = 224
    """Side of the square images in pixels."""
    validation: str | None = None
    """Separate validation shards, a folder or a pattern, with the same classes; null holds out
    `validation_shards`."""
    scale: Annotated[tuple[float, float], Span(most=1)] = (0.08, 1.0)
    """Random crop: range of its area, as a fraction of the image's."""
    multi_label: MultiLabelSettings | None = None
    """Multi-label classification: where the classes of an image are listed; null is one class per
    image, from the shards or folders."""
    crop_pct: Fraction = 0.875
    """Validation: fraction of the short side that the centre crop keeps, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if self.multi_label is not None and self.classes is not None:
            raise ValueError("classes and multi_label.classes are both given; leave out classes.")


@settings
class ClassificationRecipe(ClassifierRecipe):
    """Classification on a Swin Transformer V2, pretrained or from scratch."""

    task: Literal["classification"]
    data: ClassificationData
    """The images."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """Augmentation in addition to crop and flip."""

    def __post_init__(self) -> None:
        augmentation = self.augmentation
        channels = self.encoder.in_channels
        if (augmentation.rand_magnitude is not None or augmentation.color_jitter) and channels != 3:
            raise ValueError(
                f"augmentation.rand_magnitude and color_jitter are for images of 3 channels, and "
                f"encoder.in_channels is {channels}: leave them out."
            )

    @property
    def best_metric(self) -> str:
        """Top-1 accuracy; mean average precision for multi-label data."""
        return "top1" if self.data.multi_label is None else "mean_average_precision"

    @property
    def validation_crop(self) -> float:
        """Fraction of the short side of a picture that validation keeps, and users should."""
        return self.data.crop_pct

    @property
    def step_for_estimate(self) -> tuple[MaskSettings, LossSettings]:
        """Any mask and pixels as the target: a classifier needs as much memory as SimMIM."""
        return MaskSettings(cell=self.encoder.patch_size), LossSettings()
