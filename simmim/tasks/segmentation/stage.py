"""Fine-tuning for semantic segmentation: a class for every pixel, with UperNet or Mask2Former."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from simmim.data.datasets.label_maps import LabelledFolder, Layout
from simmim.data.loader.batches import Batch, BatchStream
from simmim.data.transforms.label_image import MOST_CLASSES, LabelReading
from simmim.data.transforms.segmentation_transforms import SegmentationTransform, SegmentationView
from simmim.data.transforms.targets import ClassMap
from simmim.limits import check_least, check_shares
from simmim.recipe import settings
from simmim.tasks.segmentation.dense_stage import DenseRecipe, DenseStage
from simmim.tasks.segmentation.heads import Mask2Former, SegmentationHead, UperNet, build_segmenter
from simmim.tasks.segmentation.metric import confusion, segmentation_figures
from simmim.tasks.segmentation.overlays import paint_classes, picture_of
from simmim.tasks.segmentation.prediction import SegmentationEvaluation, classes_of, predict
from simmim.tasks.segmentation.settings import DenseData
from swinv2 import SwinV2


@settings
class SegmentationData(DenseData):
    """Images with a label image each, and their augmentation."""

    folder: str
    """Folder of images, and of annotations: PNGs with the number of a class for each pixel, grey or
    palette, of the names of their images."""
    layout: Layout = Layout()
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

    @property
    def reading(self) -> LabelReading:
        """How annotations are read."""
        return LabelReading(
            num_classes=self.num_classes,
            ignore_label=self.ignore_label,
            reduce_zero_label=self.reduce_zero_label,
            max_pixels=self.max_pixels,
        )


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

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.data.names

    def build(self, encoder: SwinV2, names: Sequence[str]) -> UperNet | Mask2Former:
        """Return the model; see `DenseRecipe.build`."""
        return build_segmenter(encoder, names, self.head)


class SegmentationStage(DenseStage[SegmentationRecipe, LabelledFolder]):
    """Semantic segmentation.

    Raises:
        ValueError: the folder is not as it must be, or the start cannot be loaded.
    """

    model: UperNet | Mask2Former
    captions = ("image", "labels", "prediction")

    def __init__(self, recipe: SegmentationRecipe) -> None:
        data = recipe.data
        training = LabelledFolder(data.folder, data.train, data.layout)
        if data.fraction < 1:
            training = training.share(data.fraction, seed=data.fraction_seed)
        validation = (
            None
            if data.validation is None
            else LabelledFolder(data.folder, data.validation, data.layout)
        )
        super().__init__(recipe, training, validation, data.names)

    @staticmethod
    def targets_of(batch: Batch) -> Tensor:
        """Return the classes of all pixels: uint8 (batch, rows, columns)."""
        return torch.stack([class_map(batch, row) for row in range(len(batch))])

    def baselines(self) -> dict[str, float]:
        """Return the loss of holding every class for as likely as any other, for UperNet."""
        if self.recipe.head.kind != "upernet":
            return {}
        weights = 1 + self.recipe.head.auxiliary_weight
        return {"uniform_loss": weights * math.log(self.recipe.data.num_classes)}

    def training_transform(self) -> SegmentationTransform:
        """Return what scales, crops, mirrors and colours an image."""
        data = self.recipe.data
        return SegmentationTransform(
            side=data.image_size,
            seed=self.recipe.training.seed,
            labels=data.reading,
            mean=self.start.mean,
            short_side=data.short_side,
            scale=data.scale,
            largest_class=data.largest_class,
            flip=data.flip,
            photometric=data.photometric,
            channels=self.start.encoder.config.in_channels,
            max_pixels=data.max_pixels,
        )

    @torch.no_grad()
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return mIoU and its like in percent on the validation split, every image once."""
        if self.validation_shards is None:
            return {}
        classes = self.recipe.data.num_classes
        counts = torch.zeros(classes, classes, dtype=torch.int64, device=accelerator.device)
        with self._at_evaluation_windows():
            for batch in self._views(accelerator.process_index, accelerator.num_processes):
                truth = class_map(batch).to(accelerator.device)
                counts += confusion(self._predict(accelerator, batch), truth, classes)
        counts = accelerator.reduce(counts, "sum")
        return segmentation_figures(counts, self.recipe.data.names) if counts.any() else {}

    def validation_transform(self) -> SegmentationView:
        """Return what shows a whole image."""
        data = self.recipe.data
        return SegmentationView(
            labels=data.reading,
            short_side=data.short_side,
            channels=self.start.encoder.config.in_channels,
            max_pixels=data.max_pixels,
        )

    def _views(self, rank: int, world: int) -> BatchStream:
        """Return the validation images of a rank, one at a time: each has a size of its own."""
        return self.held_out(at_a_time=world, rank=rank, world=world)

    def _predict(self, accelerator: Accelerator, batch: Batch) -> Tensor:
        """Return the class found for each pixel of an image: int64 (rows, columns)."""
        images = self.module.normalise(batch.images.to(accelerator.device))
        rows, columns = class_map(batch).shape
        with accelerator.autocast():
            scores = predict(
                self.model.scores,
                images,
                (rows, columns),
                self.recipe.evaluation,
                side=self.recipe.data.image_size,
            )
        return classes_of(scores)[0]

    @contextmanager
    def _at_evaluation_windows(self) -> Iterator[None]:
        """Let the encoder have the windows of `evaluation`, and then its own again."""
        encoder = self.model.backbone.encoder
        before = encoder.config
        if self.recipe.evaluation.window_size is not None:
            encoder.set_input(window_size=self.recipe.evaluation.window_size)
        try:
            yield
        finally:
            encoder.set_input(window_size=before.window_size)

    def drawn(self, accelerator: Accelerator, colours: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Yield image, labels and prediction, at the size of the labels."""
        with self._at_evaluation_windows():
            for batch in self._views(0, 1):
                truth = class_map(batch).numpy()
                pixels = picture_of(batch, 0, truth.shape)
                found = self._predict(accelerator, batch).cpu().numpy().astype(np.uint8)
                painted = [paint_classes(pixels, classes, colours) for classes in (truth, found)]
                yield [pixels, *painted]


def class_map(batch: Batch, row: int = 0) -> Tensor:
    """Return the classes of the pixels of an image of a batch: uint8 (rows, columns)."""
    target = batch.targets[row]
    assert isinstance(target, ClassMap)
    return target.classes
