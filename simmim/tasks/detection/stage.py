"""Fine-tuning for detection and instance segmentation, with Mask2Former or RT-DETR."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from simmim.data.datasets.coco import CocoSet, category_names, has_mask
from simmim.data.loader.batch import Batch
from simmim.data.transforms.detection_transforms import (
    EvalDetectionTransform,
    TrainDetectionTransform,
    mask_of,
)
from simmim.data.transforms.image_transforms import Instances
from simmim.tasks.detection.heads import (
    Detections,
    InstanceMask2Former,
    RTDetr,
    build_detector,
)
from simmim.tasks.detection.metric import above_score, mean_average_precision, results_of
from simmim.tasks.detection.recipe import DetectionRecipe
from simmim.tasks.segmentation.dense_stage import DenseStage
from simmim.tasks.segmentation.heads import check_installed
from simmim.tasks.segmentation.overlays import draw_objects, square_picture_of
from swinv2 import SwinV2

PICTURES_AT_A_TIME = 8
"""Batch size of the images that are drawn."""


class DetectionStage(DenseStage[DetectionRecipe, CocoSet]):
    """Detection and instance segmentation.

    Raises:
        ValueError: the files cannot be used, or `init` cannot be loaded.
    """

    model: InstanceMask2Former | RTDetr
    captions = ("objects", "found")

    def __init__(self, recipe: DetectionRecipe) -> None:
        check_installed(packages=("transformers", "pycocotools", "scipy"))
        data = recipe.data
        training = CocoSet(data.images, data.annotations, only_with_objects=True)
        validation = None
        if data.validation_annotations is not None:
            validation = CocoSet(
                data.validation_images or data.images,
                data.validation_annotations,
                only_with_objects=False,
            )
            if validation.class_names != training.class_names:
                raise ValueError(
                    f"{data.annotations} and {data.validation_annotations} have different "
                    "categories: use files with the same categories."
                )
        if recipe.head.predicts_masks:
            for one in (training, validation):
                if one is not None:
                    one.require_masks()
        training = training.share(data.fraction, seed=data.fraction_seed)
        super().__init__(recipe, training, validation, training.class_names)

    @staticmethod
    def class_names(recipe: DetectionRecipe) -> tuple[str, ...]:
        """Return the names of the categories."""
        return category_names(recipe.data.annotations)

    @staticmethod
    def build_model(
        recipe: DetectionRecipe, encoder: SwinV2, names: Sequence[str]
    ) -> InstanceMask2Former | RTDetr:
        """Return the model; see `DenseStage.build_model`."""
        return build_detector(encoder, names, recipe.head)

    def training_transform(self) -> TrainDetectionTransform:
        """Return the transform: large-scale jitter, crop and flip."""
        data, ids = self.recipe.data, self.training_shards.category_ids
        return TrainDetectionTransform(
            data=data,
            seed=self.recipe.training.seed,
            mean=self.initial.mean,
            labels={number: label for label, number in enumerate(ids)},
            masks=self.model.has_masks,
            channels=self.initial.encoder.in_channels,
        )

    @torch.no_grad()
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return box and mask mAP in percent on the validation images."""
        if self.validation_shards is None:
            return {}
        results: list[dict[str, Any]] = []
        seen: list[int] = []
        rank, world = accelerator.process_index, accelerator.num_processes
        for batch in self.held_out(rank=rank, world=world):
            for row, found in enumerate(self._find(accelerator, batch)):
                seen.append(int(instances_of(batch, row).image[0]))
                results += self._results(batch, row, found)
        results, seen = gather_object(results), gather_object(seen)
        truth = self.validation_shards.ground_truth()
        figures = mean_average_precision(truth, results, seen, "bbox")
        if self.model.has_masks:
            figures |= mean_average_precision(truth, results, seen, "segm")
        return figures

    def validation_transform(self) -> EvalDetectionTransform:
        """Return the transform: the whole image, padded to a square."""
        return EvalDetectionTransform(
            data=self.recipe.data,
            mean=self.initial.mean,
            channels=self.initial.encoder.in_channels,
        )

    def _find(self, accelerator: Accelerator, batch: Batch) -> list[Detections]:
        """Return the detections in each image of a batch."""
        images = self.module.normalise(batch.images.to(accelerator.device))
        with accelerator.autocast():
            return self.model.find(images)

    def _results(self, batch: Batch, row: int, found: Detections) -> list[dict[str, Any]]:
        """Return the detections in an image of a batch as COCO results."""
        image, side = instances_of(batch, row).image.tolist(), self.recipe.data.image_size
        return results_of(found, image, side, self.pictured.category_ids)

    def picture_rows(
        self, accelerator: Accelerator, colours: np.ndarray
    ) -> Iterator[list[np.ndarray]]:
        """Yield images with true and with detected objects."""
        for batch in self.pictured_batches(at_a_time=PICTURES_AT_A_TIME):
            for row, found in enumerate(self._find(accelerator, batch)):
                certain = above_score(found, self.recipe.picture_score)
                yield self._tiles(batch, row, self._results(batch, row, certain), colours)

    def _tiles(
        self, batch: Batch, row: int, results: list[dict[str, Any]], colours: np.ndarray
    ) -> list[np.ndarray]:
        """Return an image with its true and with its detected objects."""
        number, rows, columns = instances_of(batch, row).image.tolist()
        pixels = square_picture_of(batch, row, (rows, columns), self.recipe.data.drawn_bands)
        truth = self.pictured.objects_of(number)
        labels = {one: place for place, one in enumerate(self.pictured.category_ids)}
        tiles = []
        for objects in (truth, results):
            masks = [
                mask_of(one, (rows, columns)) if self.model.has_masks and has_mask(one) else None
                for one in objects
            ]
            picked = np.array([colours[labels[one["category_id"]]] for one in objects])
            boxes = [one["bbox"] for one in objects]
            tiles.append(draw_objects(pixels, boxes, masks, picked))
        return tiles


def instances_of(batch: Batch, row: int) -> Instances:
    """Return the objects in one image of a batch."""
    target = batch.targets[row]
    assert isinstance(target, Instances)
    return target
