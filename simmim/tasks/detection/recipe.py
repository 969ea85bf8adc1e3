"""Recipe of object detection and instance segmentation."""

from typing import Literal

from simmim.limits import check_least
from simmim.recipe import settings
from simmim.tasks.segmentation.recipe import DenseData, DenseRecipe


@settings
class DetectionData(DenseData):
    """Images, and JSON files of COCO's format that say what is in them."""

    images: str
    """Folder of the images to train on."""
    annotations: str
    """JSON file of their objects."""
    validation_images: str | None = None
    """Folder of the images to validate on; null is `images`."""
    validation_annotations: str | None = None
    """JSON file of their objects; null validates on nothing."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: factor of the size at which an image just fits, from and to."""


@settings
class DetectionHead:
    """The head on the encoder."""

    kind: Literal["mask2former", "rt_detr"] = "mask2former"
    """Mask2Former finds masks, and boxes around them; RT-DETR boxes alone. Batch norms of RT-DETR
    see the images of all GPUs at a time (SyncBatchNorm); on CPUs each process's own."""
    channels: int = 256
    """Channels of the head, a multiple of 32."""
    queries: int = 100
    """Objects that are proposed for an image."""
    decoder_layers: int | None = None
    """Layers of the decoder; null is the publications': 10 (with the first prediction, 9 layers)
    of Mask2Former, 6 of RT-DETR."""
    points: int = 12544
    """Mask2Former: places of a mask that the loss looks at."""
    detections: int = 100
    """Objects that are given for an image, those of the highest scores."""

    def __post_init__(self) -> None:
        check_least(self, 1, "queries", "points", "detections")
        if self.channels < 32 or self.channels % 32:
            raise ValueError(f"channels is {self.channels}; it must be a multiple of 32.")

    @property
    def finds_masks(self) -> bool:
        """Whether it finds masks, not boxes alone."""
        return self.kind == "mask2former"


@settings
class DetectionRecipe(DenseRecipe):
    """Detection or instance segmentation on a Swin Transformer V2."""

    task: Literal["detection"]
    data: DetectionData
    """The images."""
    head: DetectionHead = DetectionHead()
    """What stands on the encoder."""
    picture_score: float = 0.5
    """Least score of what is drawn."""

    @property
    def best_metric(self) -> str:
        """Mean average precision of masks where they are found, else of boxes."""
        return "mask_map" if self.head.finds_masks else "box_map"
