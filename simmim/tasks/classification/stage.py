"""Fine-tuning for classification: average pooling and a linear head, trained with the encoder."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.datasets.mixture import Shards
from simmim.data.datasets.opening import open_sets
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import BatchStream
from simmim.data.transforms.augmentation import Augment
from simmim.data.transforms.image_transforms import (
    EvalTransform,
    LabelReader,
    TrainTransform,
    class_of,
)
from simmim.data.transforms.labels import MultiLabelReader
from simmim.data.transforms.mixing import draw_mixes, mix, partners
from simmim.data.transforms.settings import AugmentationSettings
from simmim.engine.generators import seeded
from simmim.engine.run import RunFolder
from simmim.method.encoder_protocol import encoder_flops
from simmim.tasks.architecture import resolve_architecture
from simmim.tasks.classification.classifier import (
    Classifier,
    LinearHead,
    copy_head,
    read_head,
    read_linear_head,
    save_head,
)
from simmim.tasks.classification.multi_label import multi_label_figures, multi_label_losses
from simmim.tasks.classification.recipe import (
    ClassificationData,
    ClassificationRecipe,
    ClassifierRecipe,
)
from simmim.tasks.features import Normalise, sample_drop_path_noise
from simmim.tasks.fine_tuning import DataT, FineTuningStage
from simmim.tasks.loading import all_labels, any_labelled, open_labelled
from simmim.tasks.measured import with_measured
from simmim.tasks.metrics import AccuracySums, accuracy_sums, tells_top5
from simmim.tasks.other_encoder import save_any_encoder
from simmim.tasks.pretrained import InitialEncoder
from simmim.tasks.recipe import HEAD_FOLDER
from simmim.tasks.trained import TrainedModel, below
from swinv2 import SwinV2
from swinv2.bridges.checkpoints import ClassifierHead
from swinv2.bridges.preprocessing import Preparation, describe
from swinv2.config_file import Provenance
from swinv2.weights import load_strictly


class ClassificationModule(nn.Module):
    """Cross-entropy with label smoothing, and mixup or cutmix, over stored batches."""

    def __init__(
        self,
        model: Classifier,
        initial: InitialEncoder[SwinV2],
        *,
        label_smoothing: float,
        augmentation: AugmentationSettings,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.normalise = Normalise(initial.mean, initial.std)
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
            images = mix(images, mixes)
        logits = self.model(images, sample_drop_path_noise(self.model.encoder, batch, self.seed))
        losses = self._losses(logits, batch.labels)
        if mixes is not None:
            of_partners = self._losses(logits, partners(batch.labels))
            losses = torch.lerp(
                of_partners, losses, mixes.shares.to(losses.device, non_blocking=True)
            )
        return losses.mean()

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.dtype == torch.bool:
            return multi_label_losses(logits, labels, smoothing=self.label_smoothing)
        return F.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none"
        )


RecipeT = TypeVar("RecipeT", bound=ClassifierRecipe)


class ClassifierStage(FineTuningStage[RecipeT, DataT]):
    """The base of stages with a `Classifier`: of images and of clips."""

    def __init__(
        self, recipe: RecipeT, training: DataT, validation: DataT | None, classes: tuple[str, ...]
    ) -> None:
        super().__init__(recipe, training, validation)
        recipe = self.recipe
        self.initial = initial = self.load_initial(recipe)
        self.classes = classes
        recipe.execution.apply(initial.encoder)
        with seeded(recipe.training.seed):
            self.model = Classifier(initial.encoder, len(self.classes))
        self._copy_head(initial.head, recipe.init_head)

    def _copy_head(self, source: Path | None, wanted: bool | None) -> None:
        """Start from a trained head, as the recipe's `init_head` says."""
        if wanted is False:
            return
        copied = source is not None and copy_head(self.model.head, self.classes, source)
        if wanted and not copied:
            lacks = "has no head" if source is None else "has a head without all of the classes"
            raise ValueError(
                f"init_head is true, but {self.recipe.init} {lacks}: set it to null to start from "
                "a random head, or name the classifier of these classes in init."
            )

    @property
    def flops_per_sample(self) -> int:
        """FLOPs of encoder and head; see `simmim.engine.monitor.observers.Watch`."""
        encoder = self.initial.encoder
        head: int = 2 * encoder.num_features * len(self.classes)
        return encoder_flops(encoder) + head

    def baselines(self) -> dict[str, float]:
        """Return the cross-entropy of a uniform prediction."""
        return {"uniform_loss": math.log(len(self.classes))}

    @torch.no_grad()
    def figures(
        self, batches: BatchStream, accelerator: Accelerator, logits: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return top-1 and top-5 accuracy in percent and the mean cross-entropy.

        There is no top-5 accuracy of five classes or fewer.

        Args:
            batches: this rank's part.
            accelerator: the ranks.
            logits: maps stored images to (batch, classes) logits.
        """
        total = AccuracySums()
        for batch in batches:
            assert batch.labels is not None
            with accelerator.autocast():
                found = logits(batch.images.to(accelerator.device))
            total += accuracy_sums(found, batch.labels.to(accelerator.device))
        sums = torch.tensor([total.top1, total.top5, total.loss, total.samples])
        top1, top5, loss, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        if not count:
            return {}
        figures = {"top1": 100 * top1 / count}
        if tells_top5(len(self.classes)):
            figures["top5"] = 100 * top5 / count
        return figures | {"validation_loss": loss / count}

    @classmethod
    def with_weights(
        cls, found: TrainedModel, recipe: Any, run: RunFolder, tensors: Mapping[str, Tensor]
    ) -> TrainedModel:
        """Return a model with encoder, head and class names; see `FineTuningStage`."""
        load_strictly(found.encoder, below(tensors, "encoder."), found.origin)
        head = below(tensors, "head.")
        weights = ClassifierHead(weight=head["weight"], bias=head["bias"])
        return replace(
            found,
            encoder=found.encoder.eval(),
            classifier=weights,
            head=LinearHead(task=recipe.task, weights=weights),
            classes=cls._known_classes(recipe, run, len(head["bias"])),
        )

    @classmethod
    def _known_classes(cls, recipe: Any, run: RunFolder, count: int) -> tuple[str, ...]:
        """Return the class names; empty if the data are gone or have changed."""
        try:
            if (run.path / HEAD_FOLDER).is_dir():
                _, classes = read_head(run.path / HEAD_FOLDER)
            else:
                classes = cls.class_names(recipe)
        except ValueError:
            return ()
        return classes if len(classes) == count else ()

    @classmethod
    def with_head(cls, found: TrainedModel, folder: Path) -> TrainedModel:
        """Return a model with the linear head in a folder; see `FineTuningStage`."""
        return read_linear_head(found, folder, "classification")

    @abstractmethod
    def save_encoder(self, path: Path, provenance: Provenance) -> None:
        """Write the encoder directory."""

    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory and the head into the run."""
        self.save_encoder(run.encoder, self.provenance(step, samples))
        save_head(self.model.head, run.path / HEAD_FOLDER, self.classes, self.preparation())

    def preparation(self) -> dict[str, Any] | None:
        """Return how pictures are prepared, to save with the head; None for clips."""
        return None


class ClassificationStage(ClassifierStage[ClassificationRecipe, Shards]):
    """Classification of images.

    Raises:
        ValueError: the shards have no classes or too few samples, or `init` cannot be loaded.
    """

    module: ClassificationModule

    def __init__(self, recipe: ClassificationRecipe) -> None:
        training, validation = open_split(recipe.data)
        several = recipe.data.multi_label
        classes = training.classes if several is None else several.classes
        super().__init__(recipe, training, validation, classes)
        self.module = ClassificationModule(
            self.model,
            self.initial,
            label_smoothing=recipe.label_smoothing,
            augmentation=recipe.augmentation,
            seed=recipe.training.seed,
        )

    @staticmethod
    def resolve(recipe: ClassificationRecipe) -> ClassificationRecipe:
        """Return the recipe as trained, with mean and std measured where no encoder has them."""
        return with_measured(resolve_architecture(recipe))

    @staticmethod
    def class_names(recipe: ClassificationRecipe) -> tuple[str, ...]:
        """Return the names of the classes."""
        multi_label = recipe.data.multi_label
        return recipe.data.open_shards().classes if multi_label is None else multi_label.classes

    def training_transform(self) -> TrainTransform:
        """Return the transform: crop, flip and augmentation."""
        recipe, augment = self.recipe, None
        if recipe.augmentation.changes_images:
            mean, std = self.initial.mean, self.initial.std
            augment = Augment(settings=recipe.augmentation, mean=mean, std=std)
        return TrainTransform(
            data=recipe.data,
            seed=recipe.training.seed,
            channels=self.initial.encoder.in_channels,
            augment=augment,
            label=label_reader(recipe.data),
        )

    def class_counts(self) -> dict[str, int] | None:
        """Return the number of training images of each class; None for multi-label data."""
        if self.recipe.data.multi_label is not None:
            return None
        names = self.training_shards.classes
        counts = np.bincount(all_labels(self.training_shards), minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))

    def baselines(self) -> dict[str, float]:
        """Return the loss of a uniform prediction, or of probability 1/2 for each label."""
        if self.recipe.data.multi_label is None:
            return super().baselines()
        return {"uniform_loss": math.log(2)}

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; see `simmim.engine.stage.TrainingStage`.

        Raises:
            ValueError: images are mixed in pairs, and the size of a micro-batch is odd.
        """
        training = self.recipe.training
        part = training.batch_size // world // training.accumulation
        if self.recipe.augmentation.mixes and part % 2:
            raise ValueError(
                f"mixup and cutmix need an even micro-batch, which has {part} images: change "
                "training.batch_size, training.accumulation or the number of processes."
            )
        return super().batches(rank=rank, world=world, start=start, end=end)

    def validation_transform(self) -> EvalTransform:
        """Return the transform: centre crop."""
        data = self.recipe.data
        return EvalTransform(
            size=(data.image_size, data.image_size),
            crop_pct=data.crop_pct,
            label=label_reader(data),
            channels=self.initial.encoder.in_channels,
            data=data,
        )

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return top-1 and top-5 accuracy in percent and the mean cross-entropy on held-out images.

        For multi-label data, mean average precision and binary cross-entropy.
        """
        if self.validation_shards is None:
            return {}
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = self.held_out(rank=rank, world=world)
        if self.recipe.data.multi_label is not None:
            count = len(self.classes)
            return multi_label_figures(batches, self._logits, accelerator, classes=count)
        return self.figures(batches, accelerator, self._logits)

    def preparation(self) -> dict[str, Any] | None:
        """Return how pictures are prepared, as in validation; None if not for a SwinV2."""
        if not isinstance(self.initial.encoder, SwinV2):
            return None
        # The range of stored values is the data's: an export looks at it.
        preparation = Preparation(crop_pct=self.recipe.validation_crop)
        config, mean, std = self.initial.encoder.config, self.initial.mean, self.initial.std
        return describe(config, preparation, mean, std)

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(self.module.normalise(images))
        return logits

    def save_encoder(self, path: Path, provenance: Provenance) -> None:
        """Write the encoder directory."""
        save_any_encoder(
            self.initial.encoder,
            path,
            mean=self.initial.mean,
            std=self.initial.std,
            channels=self.initial.channels,
            provenance=provenance,
        )


def label_reader(data: ClassificationData) -> LabelReader:
    """Return the function that reads the label of an image."""
    return class_of if data.multi_label is None else MultiLabelReader(data.multi_label)


def open_split(data: ClassificationData) -> tuple[Shards, Shards | None]:
    """Open the training and validation shards; None if nothing is held out.

    Raises:
        ValueError: there are no shards, no classes, samples without a class, or the validation
            shards have different classes.
    """
    validation = None
    if data.validation is not None:
        validation = open_sets(data.validation, data.remote_reading)
    if validation is not None and data.classes is not None:
        validation = validation.only_classes(data.classes)
    if validation is not None and not validation.samples:
        raise ValueError(
            f"{data.validation} has no images of the classes that are trained: there is nothing to "
            "measure. Give other data.validation."
        )
    if data.multi_label is not None:
        held_out_shards = data.validation_shards if validation is None else 0
        alone = replace(data, validation=None, validation_shards=held_out_shards)
        training, held_out = alone.split_shards()
        held_out = held_out if validation is None else validation
        training.require_own_metadata()
        held_out.require_own_metadata()
        reader = MultiLabelReader(data.multi_label)
        if not any_labelled(training, lambda raw: bool(reader(raw).any())):
            raise ValueError(
                f"no image of {training.folder} lists a class in its field "
                f"{data.multi_label.field!r}: there is nothing to learn."
            )
        return training, held_out if held_out.samples else None
    return open_labelled(
        data.open_shards(),
        validation=validation,
        validation_shards=data.validation_shards,
        fraction=data.fraction,
        seed=data.fraction_seed,
    )
