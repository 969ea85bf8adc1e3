"""Fine-tuning for classification: average pool, a linear head, and the whole encoder trained."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import Self

from simmim.data.datasets.mixture import Shards
from simmim.data.loader.batches import Batch
from simmim.data.settings import AugmentedDataSettings, open_sets, with_statistics
from simmim.data.transforms.augmentation import Augment
from simmim.data.transforms.image_transforms import (
    EvalTransform,
    LabelReading,
    TrainTransform,
    class_of,
)
from simmim.data.transforms.mixing import draw_mixes, mixed, partners
from simmim.data.transforms.multi_label import MultiLabelReader
from simmim.data.transforms.settings import AugmentationSettings, MultiLabelSettings
from simmim.limits import check_shares
from simmim.recipe import settings
from simmim.tasks.batches import train_transform
from simmim.tasks.classification.base import ClassifyingRecipe, ClassifyingStage
from simmim.tasks.classification.classifier import Classifier
from simmim.tasks.classification.multi_label import multi_label_figures, multi_label_losses
from simmim.tasks.drop_path_noise import sample_drop_path_noise
from simmim.tasks.labelled_data import open_labelled
from simmim.tasks.normalisation import Normalise
from simmim.tasks.pretrained import Start
from swinv2 import SwinV2, save_encoder
from swinv2.config_file import Provenance


@settings
class ClassificationData(AugmentedDataSettings):
    """Labelled shards and their augmentation."""

    image_size: int = 224
    """Side of the square images in pixels."""
    validation: str | None = None
    """Other shards, or folder of images, of the same classes, all of them for validation; null
    holds out `validation_shards`."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that the random crop takes, from and to."""
    multi_label: MultiLabelSettings | None = None
    """Where the classes of an image are listed that may have several, or none; null takes the one
    class of each that shards and folders know."""
    crop_pct: float = 0.875
    """Validation: share of the short side that the central crop keeps, above 0 and at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "crop_pct")
        if self.multi_label is not None and self.classes is not None:
            raise ValueError("classes picks images of one class each; multi_label has its own.")

    @property
    def label(self) -> LabelReading:
        """What reads the label of an image."""
        return class_of if self.multi_label is None else MultiLabelReader(self.multi_label)


@settings
class ClassificationRecipe(ClassifyingRecipe):
    """Classification on a Swin Transformer V2, pretrained or from scratch."""

    task: Literal["classification"]
    data: ClassificationData
    """The images."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """What is done to the images besides crop and mirroring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        augmentation = self.augmentation
        channels = self.encoder.in_channels
        if (augmentation.rand_magnitude is not None or augmentation.color_jitter) and channels != 3:
            raise ValueError(
                f"augmentation.rand_magnitude and color_jitter are for images of 3 channels, and "
                f"encoder.in_channels is {channels}: leave them out."
            )

    @property
    def best_metric(self) -> str:
        """Top-1, or mean average precision where an image may have several classes."""
        return "top1" if self.data.multi_label is None else "mean_average_precision"

    def resolved(self) -> Self:
        """Return it with mean and std as they were measured; see `FineTuningRecipe.resolved`."""
        return replace(self, data=with_statistics(self.data))

    def class_names(self) -> tuple[str, ...]:
        """Return the classes that are told apart."""
        several = self.data.multi_label
        return self.data.open_shards().classes if several is None else several.classes


class ClassificationModule(nn.Module):
    """Cross entropy with label smoothing over batches as they were stored, mixed if asked for."""

    def __init__(
        self,
        model: Classifier,
        start: Start[SwinV2],
        *,
        label_smoothing: float,
        augmentation: AugmentationSettings,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.normalise = Normalise(start.mean, start.std)
        self.label_smoothing = label_smoothing
        self.augmentation = augmentation

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        assert batch.labels is not None
        images = self.normalise(batch.images, batch.flips)
        mixes = None
        if self.training and self.augmentation.mixes:
            height, width = images.shape[2:]
            mixes = draw_mixes(self.augmentation, self.seed, batch.addresses, (height, width))
            images = mixed(images, mixes)
        logits = self.model(images, sample_drop_path_noise(self.model.encoder, batch, self.seed))
        losses = self._losses(logits, batch.labels)
        if mixes is not None:
            of_partners = self._losses(logits, partners(batch.labels))
            losses = torch.lerp(of_partners, losses, mixes.shares.to(losses.device))
        return losses.mean()

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.dtype == torch.bool:
            return multi_label_losses(logits, labels, smoothing=self.label_smoothing)
        return F.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none"
        )


class ClassificationStage(ClassifyingStage[ClassificationRecipe, Shards]):
    """Classification of images.

    Raises:
        ValueError: the shards have no classes, too few samples, or the start cannot be loaded.
    """

    module: ClassificationModule

    def __init__(self, recipe: ClassificationRecipe) -> None:
        recipe = recipe.resolved()
        training, validation = open_split(recipe.data)
        several = recipe.data.multi_label
        classes = training.classes if several is None else several.classes
        super().__init__(recipe, training, validation, classes)
        self.module = ClassificationModule(
            self.model,
            self.start,
            label_smoothing=recipe.label_smoothing,
            augmentation=recipe.augmentation,
            seed=recipe.training.seed,
        )

    def training_transform(self) -> TrainTransform:
        """Return what crops, mirrors and changes an image."""
        recipe, augment = self.recipe, None
        if recipe.augmentation.touches_pictures:
            mean, std = self.start.mean, self.start.std
            augment = Augment(settings=recipe.augmentation, mean=mean, std=std)
        return train_transform(
            recipe.data,
            seed=recipe.training.seed,
            channels=self.start.encoder.config.in_channels,
            augment=augment,
            label=recipe.data.label,
        )

    def baselines(self) -> dict[str, float]:
        """Return the loss of holding every class for as likely as any other, or for as not."""
        if self.recipe.data.multi_label is None:
            return super().baselines()
        return {"uniform_loss": math.log(2)}

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; see `simmim.engine.stage.Stage`.

        Raises:
            ValueError: images are mixed in pairs, and a micro-batch is odd.
        """
        training = self.recipe.training
        part = training.batch_size // world // training.accumulation
        if self.recipe.augmentation.mixes and part % 2:
            raise ValueError(
                f"mixup and cutmix take images in pairs, and a micro-batch holds {part}: change "
                "training.batch_size, training.accumulation or the number of processes."
            )
        return super().batches(rank=rank, world=world, start=start, end=end)

    def validation_transform(self) -> EvalTransform:
        """Return what shows the middle of an image."""
        data = self.recipe.data
        return EvalTransform(
            size=(data.image_size, data.image_size),
            crop_pct=data.crop_pct,
            label=data.label,
            channels=self.start.encoder.config.in_channels,
            max_pixels=data.max_pixels,
        )

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return top-1 and top-5 in percent and the mean cross entropy on held-out images.

        Of images with several classes it is mean average precision, and binary cross entropy.
        """
        if self.validation_shards is None:
            return {}
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = self.held_out(rank=rank, world=world)
        if self.recipe.data.multi_label is not None:
            count = len(self.classes)
            return multi_label_figures(batches, self._logits, accelerator, classes=count)
        return self.figures(batches, accelerator, self._logits)

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(self.module.normalise(images))
        return logits

    def save_encoder(self, path: Path, provenance: Provenance) -> None:
        """Write the encoder directory."""
        start = self.start
        save_encoder(start.encoder, path, mean=start.mean, std=start.std, provenance=provenance)


def open_split(data: ClassificationData) -> tuple[Shards, Shards | None]:
    """Open the training and validation shards; no validation is None.

    Raises:
        ValueError: there are no shards, no classes, samples without a class, or the validation
            shards have other classes.
    """
    validation = None
    if data.validation is not None:
        validation = open_sets(data.validation, data.remote_reading)
    if validation is not None and data.classes is not None:
        validation = validation.only_classes(data.classes)
    if data.multi_label is not None:
        held_out_shards = data.validation_shards if validation is None else 0
        training, held_out = replace(data, validation_shards=held_out_shards).split_shards()
        held_out = held_out if validation is None else validation
        return training, held_out if held_out.samples else None
    return open_labelled(
        data.open_shards(),
        validation=validation,
        validation_shards=data.validation_shards,
        fraction=data.fraction,
        seed=data.fraction_seed,
    )
