"""Fine-tuning for semantic segmentation, with UperNet or Mask2Former."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from simmim.data.datasets.label_maps import LabelledFolder
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import BatchStream
from simmim.data.transforms.image_transforms import ClassMap
from simmim.data.transforms.labels import IGNORED, LabelMapReader
from simmim.data.transforms.segmentation_transforms import (
    EvalSegmentationTransform,
    TrainSegmentationTransform,
)
from simmim.tasks.loading import any_labelled
from simmim.tasks.segmentation.dense_stage import DenseStage
from simmim.tasks.segmentation.heads import Mask2Former, UperNet, build_segmenter
from simmim.tasks.segmentation.metric import confusion, segmentation_figures
from simmim.tasks.segmentation.overlays import paint_classes, picture_of
from simmim.tasks.segmentation.prediction import classes_of, predict
from simmim.tasks.segmentation.recipe import SegmentationData, SegmentationRecipe
from swinv2 import SwinV2


class SegmentationStage(DenseStage[SegmentationRecipe, LabelledFolder]):
    """Semantic segmentation.

    Raises:
        ValueError: the folder does not have the expected layout, or `init` cannot be loaded.
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
            else LabelledFolder(data.validation_folder or data.folder, data.validation, data.layout)
        )
        for source in (training, validation):
            if source is not None:
                require_labels(source, data)
        super().__init__(recipe, training, validation, data.names)

    @staticmethod
    def class_names(recipe: SegmentationRecipe) -> tuple[str, ...]:
        """Return the names of the classes."""
        return recipe.data.names

    @staticmethod
    def build_model(
        recipe: SegmentationRecipe, encoder: SwinV2, names: Sequence[str]
    ) -> UperNet | Mask2Former:
        """Return the model; see `DenseStage.build_model`."""
        return build_segmenter(encoder, names, recipe.head)

    def baselines(self) -> dict[str, float]:
        """Return the loss of a uniform prediction for UperNet; none for Mask2Former."""
        if self.recipe.head.kind != "upernet":
            return {}
        weights = 1 + self.recipe.head.auxiliary_weight
        return {"uniform_loss": weights * math.log(self.recipe.data.num_classes)}

    def training_transform(self) -> TrainSegmentationTransform:
        """Return the transform: scale, crop, flip and photometric distortion."""
        data = self.recipe.data
        return TrainSegmentationTransform(
            data=data,
            seed=self.recipe.training.seed,
            labels=LabelMapReader(data),
            mean=self.initial.mean,
            channels=self.initial.encoder.in_channels,
        )

    @torch.no_grad()
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return mIoU, accuracies and class IoUs in percent on the validation split."""
        if self.validation_shards is None:
            return {}
        classes = self.recipe.data.num_classes
        counts = torch.zeros(classes, classes, dtype=torch.int64, device=accelerator.device)
        with self._at_evaluation_windows():
            for batch in self._views(accelerator.process_index, accelerator.num_processes):
                truth = class_map_of(batch).to(accelerator.device)
                counts += confusion(self._predict(accelerator, batch), truth, classes)
        counts = accelerator.reduce(counts, "sum")
        return segmentation_figures(counts, self.recipe.data.names) if counts.any() else {}

    def validation_transform(self) -> EvalSegmentationTransform:
        """Return the transform: the whole image."""
        data = self.recipe.data
        return EvalSegmentationTransform(
            data=data,
            labels=LabelMapReader(data),
            channels=self.initial.encoder.in_channels,
        )

    def _views(self, rank: int, world: int) -> BatchStream:
        """Return the validation images of a rank one at a time, since their sizes differ."""
        return self.held_out(at_a_time=world, rank=rank, world=world)

    def _predict(self, accelerator: Accelerator, batch: Batch) -> Tensor:
        """Return the predicted class of each pixel of an image: int64 (rows, columns)."""
        images = self.module.normalise(batch.images.to(accelerator.device))
        rows, columns = class_map_of(batch).shape
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
        """Use the attention windows of `evaluation`, and restore the encoder's afterwards."""
        encoder = self.model.backbone.encoder
        before = encoder.config
        if self.recipe.evaluation.window_size is not None:
            encoder.set_input(window_size=self.recipe.evaluation.window_size)
        try:
            yield
        finally:
            encoder.set_input(window_size=before.window_size)

    def picture_rows(
        self, accelerator: Accelerator, colours: np.ndarray
    ) -> Iterator[list[np.ndarray]]:
        """Yield image, labels and prediction, at the size of the labels."""
        with self._at_evaluation_windows():
            for batch in self.pictured_batches(at_a_time=1):
                truth = class_map_of(batch).numpy()
                pixels = picture_of(batch, 0, truth.shape, self.recipe.data.drawn_bands)
                found = self._predict(accelerator, batch).cpu().numpy().astype(np.uint8)
                painted = [paint_classes(pixels, classes, colours) for classes in (truth, found)]
                yield [pixels, *painted]


def require_labels(source: LabelledFolder, data: SegmentationData) -> None:
    """Raise ValueError if no pixel has a class; reading ends with the first label map that has."""
    reader = LabelMapReader(data)
    if not any_labelled(source, lambda raw: bool((reader.read(raw.labels) != IGNORED).any())):
        raise ValueError(
            f"no pixel of the label maps of {source.folder}, split {source.split}, has a class, so "
            "there is nothing to learn or to measure: check data.ignore_label "
            f"({data.ignore_label}), data.reduce_zero_label ({data.reduce_zero_label}) and the "
            "files."
        )


def class_map_of(batch: Batch, row: int = 0) -> Tensor:
    """Return the classes of the pixels of an image of a batch: uint8 (rows, columns)."""
    target = batch.targets[row]
    assert isinstance(target, ClassMap)
    return target.classes
