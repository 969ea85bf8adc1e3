"""Fine-tuning for semantic segmentation: a class for every pixel, with UperNet or Mask2Former."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.bad_samples import BadSamples
from simmim.data.batches import Batch, TrainingBatches, evaluation_batches
from simmim.data.order import SampleOrder
from simmim.data.targets import ClassMap
from simmim.dense.backbone import SCRATCH, Start, drawing_by, dropping_by, start_from
from simmim.dense.confusion import confusion, segmentation_figures
from simmim.dense.folder import LabelledFolder
from simmim.dense.handing_on import count_flops, save_dense
from simmim.dense.labels import MOST_CLASSES, LabelReading
from simmim.dense.overlays import paint_classes, palette, picture_of, write_panel
from simmim.dense.prediction import SegmentationEvaluation, classes_of, predict
from simmim.dense.segmenters import Mask2Former, SegmentationHead, UperNet, build_segmenter
from simmim.dense.settings import DenseData, check_slots
from simmim.dense.transforms import SegmentationTransform, SegmentationView
from simmim.engine.run import RunFolder
from simmim.engine.settings import TrainingSettings
from simmim.recipe import settings
from simmim.stages.chances import drop_path_chances
from simmim.stages.encoder_settings import EncoderSettings, ExecutionSettings
from simmim.stages.normalisation import Normalise

MODEL_FOLDER = "segmentation"
"""Folder in the run with encoder and head, as transformers loads them."""


@settings
class SegmentationData(DenseData):
    """Images with a label image each, and their augmentation."""

    folder: str
    """Folder with images/SPLIT and annotations/SPLIT: an annotation is the PNG of its image's name,
    with the number of a class for each pixel, grey or palette."""
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
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; it must be 1 or more.")
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(f"num_classes is {self.num_classes}; from 1 to {MOST_CLASSES}.")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names for {self.num_classes} classes."
            )
        if not 0 < self.largest_class <= 1:
            raise ValueError(f"largest_class is {self.largest_class}; above 0, at most 1.")

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
class SegmentationRecipe:
    """Semantic segmentation on a Swin Transformer V2, pretrained or from scratch."""

    task: Literal["segmentation"]
    """What this recipe does."""
    init: str = SCRATCH
    """`scratch`, or an encoder directory to start from. A directory brings its architecture
    (variant, patch, channels, sizes) and its mean and std: of `encoder` only `window_size` and
    `drop_path` then apply, and data.mean and data.std do not."""
    encoder: EncoderSettings
    """The encoder."""
    data: SegmentationData
    """The images."""
    head: SegmentationHead = SegmentationHead()
    """What stands on the encoder."""
    evaluation: SegmentationEvaluation = SegmentationEvaluation()
    """How validation looks at images."""
    pictures: int = 4
    """Validation images that are drawn with what is found in them; 0 draws none."""
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


class SegmentationModule(nn.Module):
    """The loss of a segmenter over batches as they were stored."""

    def __init__(self, model: UperNet | Mask2Former, start: Start, *, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.normalise = Normalise(start.mean, start.std)

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        images = self.normalise(batch.images, batch.flips)
        chances = drop_path_chances(self.model.backbone.encoder, batch, self.seed)
        classes = torch.stack([class_map(batch, row) for row in range(len(batch))])
        with dropping_by(self.model.backbone, chances), drawing_by(batch, self.seed):
            return self.model.loss(images, classes)


def class_map(batch: Batch, row: int) -> Tensor:
    """Return the classes of the pixels of one image of a batch: uint8 (rows, columns)."""
    target = batch.targets[row]
    assert isinstance(target, ClassMap)
    return target.classes


class SegmentationStage:
    """Semantic segmentation, as the training loop sees it.

    Raises:
        ValueError: the folder is not as it must be, or the start cannot be loaded.
    """

    best_metric = "miou"
    """The figure of validation that says which checkpoint is best."""
    probe_every: int | None = None
    """No probe: there are labels already."""

    def __init__(self, recipe: SegmentationRecipe) -> None:
        self.recipe = recipe
        data, training = recipe.data, recipe.training
        self.bad_samples = BadSamples(data.max_bad_share)
        self.training_shards = LabelledFolder(data.folder, data.train)
        if data.fraction < 1:
            self.training_shards = self.training_shards.share(
                data.fraction, seed=data.fraction_seed
            )
        self.validation_shards = (
            None if data.validation is None else LabelledFolder(data.folder, data.validation)
        )
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
            self.model = build_segmenter(self.start.encoder, data.names, recipe.head)
        recipe.execution.apply(self.model.backbone.encoder)
        self.module = SegmentationModule(self.model, self.start, seed=training.seed)
        self.depths = self.start.encoder.config.depths

    @cached_property
    def flops_per_sample(self) -> int:
        """Operations of encoder and head; see `simmim.engine.stage.Stage`."""
        return count_flops(self.model.net, self.model.backbone, self.recipe.data.image_size)

    def probe(self, accelerator: Accelerator) -> dict[str, float]:
        """Return nothing."""
        del accelerator
        return {}

    def baselines(self) -> dict[str, float]:
        """Return the loss of holding every class for as likely as any other, for UperNet."""
        if self.recipe.head.kind != "upernet":
            return {}
        weights = 1 + self.recipe.head.auxiliary_weight
        return {"uniform_loss": weights * math.log(self.recipe.data.num_classes)}

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; see `simmim.engine.stage.Stage`."""
        data, training = self.recipe.data, self.recipe.training
        transform = SegmentationTransform(
            side=data.image_size,
            seed=training.seed,
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
        """Return mIoU and its like in percent on the validation split, every image once."""
        if self.validation_shards is None:
            return {}
        classes = self.recipe.data.num_classes
        counts = torch.zeros(classes, classes, dtype=torch.int64, device=accelerator.device)
        with self._at_evaluation_windows():
            for batch in self._views(accelerator.process_index, accelerator.num_processes):
                truth = class_map(batch, 0).to(accelerator.device)
                counts += confusion(self._predict(accelerator, batch), truth, classes)
        counts = accelerator.reduce(counts, "sum")
        return segmentation_figures(counts, self.recipe.data.names) if counts.any() else {}

    def _views(self, rank: int, world: int) -> Iterator[Batch]:
        """Yield the validation images of a rank, one at a time: each has a size of its own."""
        data = self.recipe.data
        assert self.validation_shards is not None
        view = SegmentationView(
            labels=data.reading,
            short_side=data.short_side,
            channels=self.start.encoder.config.in_channels,
            max_pixels=data.max_pixels,
        )
        stream = evaluation_batches(
            self.validation_shards,
            view,
            batch_size=world,
            rank=rank,
            world=world,
            workers=data.workers,
            bad_samples=self.bad_samples,
        )
        yield from stream

    def _predict(self, accelerator: Accelerator, batch: Batch) -> Tensor:
        """Return the class found for each pixel of an image: int64 (rows, columns)."""
        images = self.module.normalise(batch.images.to(accelerator.device))
        rows, columns = class_map(batch, 0).shape
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

    def fresh(self) -> "SegmentationStage":
        """Return a stage of the same recipe, with initial weights on the CPU."""
        return SegmentationStage(self.recipe)

    @torch.no_grad()
    def look(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw validation images, what is true of them and what is found."""
        if self.validation_shards is None or not self.recipe.pictures:
            return None
        self.module.eval()
        colours = palette(self.recipe.data.num_classes)
        rows = []
        with self._at_evaluation_windows():
            for batch in self._views(0, 1):
                found = self._predict(accelerator, batch).cpu()
                rows.append(_tiles(batch, found, colours))
                if len(rows) == self.recipe.pictures:
                    break
        path = run.reconstructions / f"step-{step:08d}.png"
        legend = list(zip(self.recipe.data.names, colours, strict=True))
        write_panel(rows, ("image", "labels", "prediction"), legend, path)
        return path

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


def _tiles(batch: Batch, found: Tensor, colours: np.ndarray) -> list[np.ndarray]:
    """Return image, labels and prediction of one image, at the size of its labels."""
    truth = class_map(batch, 0).numpy()
    pixels = picture_of(batch, 0, truth.shape)
    predicted = found.numpy().astype(np.uint8)
    return [
        pixels,
        paint_classes(pixels, truth, colours),
        paint_classes(pixels, predicted, colours),
    ]
