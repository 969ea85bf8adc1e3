"""Recipe of semantic segmentation, and settings shared with detection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from data_prep.bounds import Amount, Bounds, Count, Fraction, Positive, Whole
from simmim.data.datasets.label_maps import FolderLayout
from simmim.data.settings import CroppedSettings, DrawnSettings
from simmim.data.transforms.settings import LabelMapSettings, SegmentationCropSettings
from simmim.recipe import settings
from simmim.tasks.recipe import FineTuningRecipe


@settings
class DenseData(CroppedSettings, DrawnSettings):
    """Image files, and how they are read, scaled, cropped and flipped."""

    REMEDY = "Repair or remove these files"

    fraction: Fraction = 1.0
    """Fraction of the training images that is used, above 0; larger ones contain smaller ones."""
    fraction_seed: int = 0
    """Seed of that choice."""
    image_size: Count
    """Side of the square training crops in pixels."""


@settings
class DenseRecipe(FineTuningRecipe):
    """Fine-tuning with a head of transformers on the encoder as backbone."""

    data: DenseData
    """The images."""
    pictures: Whole = 4
    """Validation images to draw with their predictions, spread over the split and always the same,
    or training images if none are held out; 0 draws none."""


@settings
class SegmentationHead:
    """The head on the encoder."""

    kind: Literal["upernet", "mask2former"] = "upernet"
    """UperNet (the paper's), or Mask2Former. UperNet's batch norms are synchronised over GPUs
    (SyncBatchNorm); on CPUs each process has its own, and should have two images or more."""
    channels: Count | None = None
    """Channels of the head; null is 512 for UperNet and 256 for Mask2Former, as published.
    Mask2Former needs a multiple of 32."""
    auxiliary_weight: Amount = 0.4
    """UperNet: loss weight of the auxiliary head on the second-to-last feature map; 0 for none."""
    auxiliary_channels: Count = 256
    """UperNet: channels of the auxiliary head."""
    queries: Count = 100
    """Mask2Former: number of queries (mask proposals per image)."""
    decoder_layers: Annotated[int, Bounds(ge=2)] = 10
    """Mask2Former: number of decoder layers plus one; 10 in the paper."""
    points: Count = 12544
    """Mask2Former: points of a mask that the loss is sampled at."""

    def __post_init__(self) -> None:
        if self.kind == "mask2former" and (self.channels or 32) % 32:
            raise ValueError(
                f"channels is {self.channels}; it must be a multiple of 32 for Mask2Former."
            )


@settings
class SegmentationEvaluation:
    """Inference in validation: whole images or sliding windows, scales and flip."""

    mode: Literal["whole", "slide"] = "whole"
    """Whole images, or square sliding windows whose scores are averaged where they overlap."""
    size: Count | None = None
    """Side of the sliding windows in pixels; null is data.image_size."""
    stride: Count | None = None
    """Stride of the sliding windows in pixels; null is two thirds of a window."""
    window_size: Count | None = None
    """Side of the attention windows in tokens; null is encoder.window_size. The paper uses 56
    with a size of 896 for an encoder trained at 640 with 40."""
    scales: tuple[Positive, ...] = (1.0,)
    """Scale factors for multi-scale inference, whose scores are averaged."""
    flip: bool = False
    """Average with the scores of the flipped image."""

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("scales is empty; give at least one.")

    def check_stride(self, side: int) -> None:
        """Raise ValueError if sliding windows leave gaps; `side` is the default of their size."""
        size = self.size or side
        if self.mode == "slide" and self.stride is not None and self.stride > size:
            raise ValueError(
                f"evaluation.stride is {self.stride}, larger than the windows of {size} pixels, so "
                "there would be gaps: choose a smaller one."
            )


@settings
class SegmentationData(DenseData, SegmentationCropSettings, LabelMapSettings):
    """Images with label maps, and their augmentation."""

    folder: str
    """Folder of images and annotations: grey or palette PNGs with the class number of each pixel,
    named as their images. Images with an Exif orientation are read upright, and their annotations
    have to be upright, by an orientation of their own or as they are stored."""
    layout: FolderLayout = FolderLayout()
    """Where images and annotations are in the folder."""
    train: str = "training"
    """Name of the split to train on."""
    validation: str | None = "validation"
    """Name of the split to validate on; null for none."""
    validation_folder: str | None = None
    """Folder of the validation split; null is `folder`."""
    class_names: tuple[str, ...] | None = None
    """Class names in the order of their numbers; null is class 0, class 1, ..."""

    def __post_init__(self) -> None:
        images, _ = self.layout.folders(Path(self.folder), self.train)
        held_out = None
        if self.validation is not None:
            root = Path(self.validation_folder or self.folder)
            held_out, _ = self.layout.folders(root, self.validation)
        if images == held_out:
            raise ValueError(
                f"training and validation both use the images of {images}: put "
                "{split} into data.layout.images, or set data.validation to another split or null."
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"num_classes is {self.num_classes}, and len(class_names) is "
                f"{len(self.class_names)}; give one name per class."
            )

    @property
    def first_shards(self) -> str | None:
        """The folder of the training images."""
        images, _ = self.layout.folders(Path(self.folder), self.train)
        return str(images)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.class_names or tuple(f"class {one}" for one in range(self.num_classes))


@settings
class SegmentationRecipe(DenseRecipe):
    """Semantic segmentation on a Swin Transformer V2, pretrained or from scratch."""

    HEAD: ClassVar[str] = "segmentation"
    VALIDATION: ClassVar[str] = "--data.validation SPLIT, or --data.validation_folder FOLDER"
    task: Literal["segmentation"]
    data: SegmentationData
    """The images."""
    head: SegmentationHead = SegmentationHead()
    """The head on the encoder."""
    evaluation: SegmentationEvaluation = SegmentationEvaluation()
    """Inference in validation."""

    def __post_init__(self) -> None:
        self.evaluation.check_stride(self.data.image_size)

    @classmethod
    def validating_on(cls, source: str, overrides: Sequence[str]) -> list[str]:
        """Return the overrides that validate on the folder `source`; see `TaskRecipe`."""
        del overrides
        return ["--data.validation_folder", source]

    @property
    def best_metric(self) -> str:
        """Mean intersection over union."""
        return "miou"
