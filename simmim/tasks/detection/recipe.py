"""Recipe of object detection and instance segmentation."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from data_prep.bounds import Bounds, Count
from simmim.data.transforms.settings import DetectionCropSettings
from simmim.recipe import settings
from simmim.tasks.segmentation.recipe import DenseData, DenseRecipe


@settings
class DetectionData(DenseData, DetectionCropSettings):
    """Images with annotations in COCO format."""

    images: str
    """Folder of the training images."""
    annotations: str
    """COCO annotation file (JSON) of the training images. Images with an Exif orientation are read
    upright: sizes, boxes and masks have to be those of the upright image."""
    validation_images: str | None = None
    """Folder of the validation images; null is `images`."""
    validation_annotations: str | None = None
    """COCO annotation file of the validation images; null for no validation."""

    @property
    def first_shards(self) -> str | None:
        """The folder of the training images."""
        return self.images


@settings
class DetectionHead:
    """The head on the encoder."""

    kind: Literal["mask2former", "rt_detr"] = "mask2former"
    """Mask2Former predicts masks, with boxes around them; RT-DETR boxes only. RT-DETR's batch norms
    are synchronised over GPUs (SyncBatchNorm); on CPUs each process has its own."""
    channels: Annotated[int, Bounds(ge=32, multiple_of=32)] = 256
    """Channels of the head, a multiple of 32."""
    queries: Count = 100
    """Number of queries (object proposals per image)."""
    decoder_layers: int | None = None
    """Decoder layers; null is 10 for Mask2Former (9 layers plus the first prediction) and 6 for
    RT-DETR, as published."""
    points: Count = 12544
    """Mask2Former: points of a mask that the loss is sampled at."""
    detections: Count = 100
    """Maximum number of detections per image, those with the highest scores."""

    @property
    def predicts_masks(self) -> bool:
        """Whether the head predicts masks in addition to boxes."""
        return self.kind == "mask2former"


@settings
class DetectionRecipe(DenseRecipe):
    """Detection or instance segmentation on a Swin Transformer V2."""

    HEAD: ClassVar[str] = "detection"
    VALIDATION: ClassVar[str] = (
        "--data.validation_annotations FILE, and --data.validation_images FOLDER"
    )
    task: Literal["detection"]
    data: DetectionData
    """The images."""
    head: DetectionHead = DetectionHead()
    """The head on the encoder."""
    picture_score: float = 0.5
    """Lowest score of drawn detections."""

    @classmethod
    def validating_on(cls, source: str, overrides: Sequence[str]) -> list[str]:
        """Return the overrides that validate on a folder of images, or on an annotation file.

        Raises:
            ValueError: it is a folder, and no override names the annotations.
        """
        if source.endswith(".json"):
            return ["--data.validation_annotations", source]
        named = [one.partition("=")[0] for one in overrides]
        if "--data.validation_annotations" not in named:
            raise ValueError(
                f"--data {source} needs annotations: give the folder of the images as --data or "
                "--data.validation_images, and their COCO file as --data.validation_annotations."
            )
        return ["--data.validation_images", source]

    @property
    def best_metric(self) -> str:
        """Mean average precision of masks, or of boxes if the head predicts no masks."""
        return "mask_map" if self.head.predicts_masks else "box_map"
