"""Recipe of semantic segmentation, and what it shares with detection."""

from pathlib import Path
from typing import Literal

from simmim.data.datasets.label_maps import FolderLayout
from simmim.data.settings import IMAGENET_MEAN, IMAGENET_STD, CroppedSettings
from simmim.data.transforms.labels import MOST_CLASSES
from simmim.limits import check_least, check_shares, check_span
from simmim.recipe import settings
from simmim.tasks.recipe import FineTuningRecipe


@settings
class DenseData(CroppedSettings):
    """Files of images, how they are read, scaled, cropped and mirrored."""

    REMEDY = "Mend or leave out these files"

    fraction: float = 1.0
    """Share of the training images that is used, above 0; a larger one holds every smaller one."""
    fraction_seed: int = 0
    """Seed of that choice."""
    image_size: int
    """Side of the square crops that are trained on, pixels."""
    scale: tuple[float, float]
    """Factor of the image's size before the crop, from and to."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "fraction")
        check_span(self, "scale")


@settings
class DenseRecipe(FineTuningRecipe):
    """A head of transformers on the encoder as its backbone."""

    data: DenseData
    """The images."""
    pictures: int = 4
    """Validation images that are drawn with what is found in them; 0 draws none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "pictures")


@settings
class SegmentationHead:
    """The head on the encoder."""

    kind: Literal["upernet", "mask2former"] = "upernet"
    """UperNet (the paper's), or Mask2Former. Batch norms of UperNet see the images of all GPUs at a
    time (SyncBatchNorm); on CPUs each process's own, of which there should be two at least."""
    channels: int | None = None
    """Channels of the head; null is the publications': 512 of UperNet, 256 of Mask2Former, which
    takes a multiple of 32."""
    auxiliary_weight: float = 0.4
    """UperNet: weight of the loss of a second, small head on the last map but one; 0 has none."""
    auxiliary_channels: int = 256
    """UperNet: channels of that head."""
    queries: int = 100
    """Mask2Former: masks that are proposed for an image."""
    decoder_layers: int = 10
    """Mask2Former: layers of the transformer decoder and one; the paper's is 10."""
    points: int = 12544
    """Mask2Former: places of a mask that the loss looks at."""

    def __post_init__(self) -> None:
        check_least(self, 1, "channels", "auxiliary_channels", "queries", "points")
        check_least(self, 2, "decoder_layers")
        check_least(self, 0, "auxiliary_weight")
        if self.kind == "mask2former" and (self.channels or 32) % 32:
            raise ValueError(f"channels is {self.channels}; Mask2Former takes a multiple of 32.")


@settings
class SegmentationEvaluation:
    """How an image is looked at to tell the classes of its pixels."""

    mode: Literal["whole", "slide"] = "whole"
    """The whole image at once, or square windows of it, averaged where they overlap."""
    size: int | None = None
    """Side of the windows in pixels; null is data.image_size."""
    stride: int | None = None
    """Pixels from one window to the next; null is two thirds of a window."""
    window_size: int | None = None
    """Side of the attention windows in tokens; null is encoder.window_size. 56 with a size of 896
    is the paper's for an encoder trained at 640 with 40."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the image's size whose scores are averaged."""
    flip: bool = False
    """Average with the scores of the mirrored image too."""

    def __post_init__(self) -> None:
        check_least(self, 1, "size", "stride", "window_size")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales are {self.scales}; give at least one, all above 0.")

    def check_stride(self, side: int) -> None:
        """Raise ValueError where windows leave gaps; `side` is theirs where no size is given."""
        size = self.size or side
        if self.mode == "slide" and self.stride is not None and self.stride > size:
            raise ValueError(
                f"evaluation.stride is {self.stride} and leaves gaps between windows of {size} "
                "pixels: choose a smaller one."
            )


@settings
class SegmentationData(DenseData):
    """Images with a label image each, and their augmentation."""

    folder: str
    """Folder of images, and of annotations: PNGs with the number of a class for each pixel, grey or
    palette, of the names of their images."""
    layout: FolderLayout = FolderLayout()
    """Where both lie in it."""
    train: str = "training"
    """Name of the split to train on."""
    validation: str | None = "validation"
    """Name of the split to validate on; null validates on nothing."""
    num_classes: int
    """Number of classes, at most 255."""
    class_names: tuple[str, ...] | None = None
    """Their names, in the order of their numbers; null calls them class 0, class 1, ..."""
    ignore_label: int | None = 255
    """Number in the annotations that stands for no class."""
    reduce_zero_label: bool = False
    """Whether 0 stands for no class and the classes count from 1, as in ADE20K."""
    short_side: int | None = None
    """Pixels that the short side of an image is scaled to, before the random scale and for
    validation; null keeps the image's own."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Factor of the image's size before the crop, from and to."""
    largest_class: float = 0.75
    """Share of a crop that a single class may have; ten crops are tried."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue at random, as SSD does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "short_side")
        splits = [self.train] if self.validation is None else [self.train, self.validation]
        folders = {self.layout.folders(Path(self.folder), split)[0] for split in splits}
        if len(folders) < len(splits):
            raise ValueError(
                f"training and validation take the same images, those of {min(folders)}: put "
                "{split} into data.layout.images, or set data.validation to another split or null."
            )
        check_shares(self, "largest_class")
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(f"num_classes is {self.num_classes}; from 1 to {MOST_CLASSES}.")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names for {self.num_classes} classes."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.class_names or tuple(f"class {one}" for one in range(self.num_classes))


@settings
class SegmentationRecipe(DenseRecipe):
    """Semantic segmentation on a Swin Transformer V2, pretrained or from scratch."""

    task: Literal["segmentation"]
    data: SegmentationData
    """The images."""
    head: SegmentationHead = SegmentationHead()
    """What stands on the encoder."""
    evaluation: SegmentationEvaluation = SegmentationEvaluation()
    """How validation looks at images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.evaluation.check_stride(self.data.image_size)

    @property
    def best_metric(self) -> str:
        """Mean intersection over union."""
        return "miou"
