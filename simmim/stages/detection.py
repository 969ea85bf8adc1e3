"""Fine-tuning for detection and instance segmentation, with Mask2Former or RT-DETR."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from simmim.data.bad_samples import BadSamples
from simmim.data.batches import Batch, TrainingBatches, evaluation_batches
from simmim.data.order import SampleOrder
from simmim.data.targets import Instances
from simmim.dense.backbone import (
    SCRATCH,
    Start,
    check_installed,
    drawing_by,
    dropping_by,
    start_from,
)
from simmim.dense.coco import CocoSet, has_mask
from simmim.dense.coco_metric import mean_average_precision, most_certain, results_of
from simmim.dense.detectors import DetectionHead, InstanceMask2Former, RTDetr, build_detector
from simmim.dense.handing_on import count_flops, save_dense
from simmim.dense.jitter import DetectionView, JitterTransform, mask_of
from simmim.dense.overlays import draw_objects, palette, square_picture_of, write_panel
from simmim.dense.settings import DenseData, check_slots
from simmim.engine.run import RunFolder
from simmim.engine.settings import TrainingSettings
from simmim.recipe import settings
from simmim.stages.chances import drop_path_chances
from simmim.stages.encoder_settings import EncoderSettings, ExecutionSettings
from simmim.stages.normalisation import Normalise

MODEL_FOLDER = "detection"
"""Folder in the run with encoder and head, as transformers loads them."""


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
class DetectionRecipe:
    """Detection or instance segmentation on a Swin Transformer V2."""

    task: Literal["detection"]
    """What this recipe does."""
    init: str = SCRATCH
    """`scratch`, or an encoder directory to start from. A directory brings its architecture
    (variant, patch, channels, sizes) and its mean and std: of `encoder` only `window_size` and
    `drop_path` then apply, and data.mean and data.std do not."""
    encoder: EncoderSettings
    """The encoder."""
    data: DetectionData
    """The images."""
    head: DetectionHead = DetectionHead()
    """What stands on the encoder."""
    pictures: int = 4
    """Validation images that are drawn with what is found in them; 0 draws none."""
    picture_score: float = 0.5
    """Least score of what is drawn."""
    execution: ExecutionSettings = ExecutionSettings()
    """How the encoder is computed."""
    training: TrainingSettings
    """The training."""

    def __post_init__(self) -> None:
        check_slots(self.data, self.training)
        if self.pictures < 0:
            raise ValueError(f"pictures is {self.pictures}; it must be 0 or more.")
        if self.init == SCRATCH:
            self.encoder.check_channels(self.data.mean)
            config = self.encoder.config(self.data.image_size)  # raises where sizes cannot work
            self.execution.check_stages(len(config.depths))


class DetectionModule(nn.Module):
    """The loss of a detector over batches as they were stored."""

    def __init__(self, model: InstanceMask2Former | RTDetr, start: Start, *, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.normalise = Normalise(start.mean, start.std)

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        images = self.normalise(batch.images, batch.flips)
        chances = drop_path_chances(self.model.backbone.encoder, batch, self.seed)
        targets = [instances(batch, row) for row in range(len(batch))]
        with dropping_by(self.model.backbone, chances), drawing_by(batch, self.seed):
            return self.model.loss(images, targets)


def instances(batch: Batch, row: int) -> Instances:
    """Return the objects in one image of a batch."""
    target = batch.targets[row]
    assert isinstance(target, Instances)
    return target


class DetectionStage:
    """Detection, as the training loop sees it.

    Raises:
        ValueError: the files are not as they must be, or the start cannot be loaded.
    """

    probe_every: int | None = None
    """No probe: there are labels already."""

    def __init__(self, recipe: DetectionRecipe) -> None:
        check_installed(packages=("transformers", "pycocotools", "scipy"))
        self.recipe = recipe
        data, training = recipe.data, recipe.training
        self.bad_samples = BadSamples(data.max_bad_share)
        whole = CocoSet(data.images, data.annotations, only_with_objects=True)
        masks = recipe.head.kind == "mask2former"
        if masks:
            whole.require_masks()
        self.training_shards = whole.share(data.fraction, seed=data.fraction_seed)
        self.validation_shards = None
        if data.validation_annotations is not None:
            held_out = CocoSet(
                data.validation_images or data.images,
                data.validation_annotations,
                only_with_objects=False,
            )
            if held_out.class_names != whole.class_names:
                raise ValueError(
                    f"{data.annotations} and {data.validation_annotations} have different "
                    "categories, so a class does not mean the same in both."
                )
            self.validation_shards = held_out
        self.order = SampleOrder(self.training_shards.sizes, seed=training.seed, slots=data.slots)
        self.samples_per_epoch = self.order.samples_per_epoch
        self.data_digest = self.training_shards.digest
        self.start = start_from(
            recipe.init,
            recipe.encoder,
            image_size=data.image_size,
            training=training,
            normalisation=(data.mean, data.std),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = build_detector(self.start.encoder, whole.class_names, recipe.head)
        recipe.execution.apply(self.model.backbone.encoder)
        self.module = DetectionModule(self.model, self.start, seed=training.seed)
        self.depths = self.start.encoder.config.depths
        self.best_metric = "mask_map" if masks else "box_map"

    @cached_property
    def flops_per_sample(self) -> int:
        """Operations of encoder and head; see `simmim.engine.stage.Stage`."""
        return count_flops(self.model.net, self.model.backbone, self.recipe.data.image_size)

    def probe(self, accelerator: Accelerator) -> dict[str, float]:
        """Return nothing."""
        del accelerator
        return {}

    def baselines(self) -> dict[str, float]:
        """Return nothing: no answer without learning has a loss that tells."""
        return {}

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; see `simmim.engine.stage.Stage`."""
        data, training = self.recipe.data, self.recipe.training
        ids = self.training_shards.category_ids
        transform = JitterTransform(
            side=data.image_size,
            seed=training.seed,
            mean=self.start.mean,
            labels={number: label for label, number in enumerate(ids)},
            masks=self.model.has_masks,
            scale=data.scale,
            flip=data.flip,
            channels=self.start.encoder.config.in_channels,
            max_pixels=data.max_pixels,
        )
        return TrainingBatches(
            self.training_shards,
            self.order,
            transform,
            batch_size=training.batch_size,
            start_position=start,
            end_position=end,
            accumulation=training.accumulation,
            rank=rank,
            world=world,
            workers=data.workers,
            pin_memory=torch.cuda.is_available(),
            bad_samples=self.bad_samples,
        )

    @torch.no_grad()
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return box and mask mAP in percent on the validation images, every image once."""
        if self.validation_shards is None:
            return {}
        side = self.recipe.data.image_size
        ids = self.validation_shards.category_ids
        results: list[dict[str, Any]] = []
        seen: list[int] = []
        for batch in self._views(accelerator.process_index, accelerator.num_processes):
            images = self.module.normalise(batch.images.to(accelerator.device))
            with accelerator.autocast():
                found = self.model.find(images)
            for row, one in enumerate(found):
                image = instances(batch, row).image.tolist()
                seen.append(image[0])
                results += results_of(one, image, side, ids)
        results, seen = gather_object(results), gather_object(seen)
        truth = self.validation_shards.ground_truth()
        figures = mean_average_precision(truth, results, seen, "bbox")
        if self.model.has_masks:
            figures |= mean_average_precision(truth, results, seen, "segm")
        return figures

    def _views(self, rank: int, world: int) -> Iterator[Batch]:
        data, training = self.recipe.data, self.recipe.training
        assert self.validation_shards is not None
        view = DetectionView(
            side=data.image_size,
            mean=self.start.mean,
            channels=self.start.encoder.config.in_channels,
            max_pixels=data.max_pixels,
        )
        yield from evaluation_batches(
            self.validation_shards,
            view,
            batch_size=max(world, training.batch_size // training.accumulation),
            rank=rank,
            world=world,
            workers=data.workers,
            bad_samples=self.bad_samples,
        )

    def fresh(self) -> "DetectionStage":
        """Return a stage of the same recipe, with initial weights on the CPU."""
        return DetectionStage(self.recipe)

    @torch.no_grad()
    def look(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw validation images with their objects, true and found."""
        if self.validation_shards is None or not self.recipe.pictures:
            return None
        self.module.eval()
        colours = palette(len(self.validation_shards.class_names))
        rows: list[list[np.ndarray]] = []
        for batch in self._views(0, 1):
            images = self.module.normalise(batch.images.to(accelerator.device))
            with accelerator.autocast():
                found = self.model.find(images)
            for row, one in enumerate(found):
                if len(rows) < self.recipe.pictures:
                    certain = most_certain(one, self.recipe.picture_score)
                    side, ids = self.recipe.data.image_size, self.validation_shards.category_ids
                    image = instances(batch, row).image.tolist()
                    results = results_of(certain, image, side, ids)
                    rows.append(self._tiles(batch, row, results, colours))
            if len(rows) == self.recipe.pictures:
                break
        path = run.reconstructions / f"step-{step:08d}.png"
        legend = list(zip(self.validation_shards.class_names, colours, strict=True))
        write_panel(rows, ("objects", "found"), legend, path)
        return path

    def _tiles(
        self, batch: Batch, row: int, results: list[dict[str, Any]], colours: np.ndarray
    ) -> list[np.ndarray]:
        """Return an image with its objects, and with those that were found."""
        assert self.validation_shards is not None
        number, rows, columns = instances(batch, row).image.tolist()
        pixels = square_picture_of(batch, row, (rows, columns))
        truth = self.validation_shards.objects_of(number)
        labels = {one: place for place, one in enumerate(self.validation_shards.category_ids)}
        tiles = []
        for objects in (truth, results):
            masks = [mask_of(one, (rows, columns)) if has_mask(one) else None for one in objects]
            picked = np.array([colours[labels[one["category_id"]]] for one in objects])
            boxes = [one["bbox"] for one in objects]
            tiles.append(draw_objects(pixels, boxes, masks, picked))
        return tiles

    def hand_on(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory, and encoder and head as transformers has them."""
        save_dense(
            self.model.net,
            self.model.backbone,
            run,
            run.path / MODEL_FOLDER,
            start=self.start,
            recipe=self.recipe,
            step=step,
            samples=samples,
        )
