"""Fine-tuning for classification: average pool, a linear head, and the whole encoder trained."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.augmentation import Augment, AugmentationSettings
from simmim.data.batches import Batch, evaluation_batches
from simmim.data.mixing import draw_mixes, mixed, partners
from simmim.data.mixture import Shards, order_of
from simmim.data.multi_label import MultiLabelSettings
from simmim.data.settings import AugmentedDataSettings, open_sets, with_statistics
from simmim.data.transforms import EvalTransform, LabelReading, class_of
from simmim.engine.run import RunFolder
from simmim.engine.settings import TrainingSettings
from simmim.recipe import recipe_hash, settings
from simmim.stages.batches import check_batches, training_batches
from simmim.stages.chances import drop_path_chances
from simmim.stages.classifier import Classifier, Scores, save_head, score
from simmim.stages.encoder_settings import EncoderSettings, ExecutionSettings
from simmim.stages.labelled import open_labelled
from simmim.stages.multi_label import multi_label_figures, multi_label_losses
from simmim.stages.normalisation import Normalise
from simmim.stages.starting import HEAD_FOLDER, source_of, take_head
from swinv2 import SwinV2, build_encoder, load_encoder, save_encoder
from swinv2.flops import forward_flops
from swinv2.weights import Provenance, read_encoder_config

SCRATCH = "scratch"


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
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; above 0, at most 1.")
        if self.multi_label is not None and self.classes is not None:
            raise ValueError("classes picks images of one class each; multi_label has its own.")

    @property
    def label(self) -> LabelReading:
        """What reads the label of an image."""
        return class_of if self.multi_label is None else self.multi_label


@settings
class ClassificationRecipe:
    """Classification on a Swin Transformer V2, pretrained or from scratch."""

    task: Literal["classification"]
    """What this recipe does."""
    init: str = SCRATCH
    """`scratch`, or what to start from: an encoder directory, or the folder of a run that has
    ended. It brings its architecture (variant, patch, channels, sizes) and its mean and std: of
    `encoder` only `window_size` and `drop_path` then apply, and data.mean and data.std do not. A
    classification run brings its head too, where it knows all classes by the same names."""
    encoder: EncoderSettings
    """The encoder."""
    data: ClassificationData
    """The images."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes, 0 to below 1."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """What is done to the images besides crop and mirroring."""
    execution: ExecutionSettings = ExecutionSettings()
    """How the encoder is computed."""
    training: TrainingSettings
    """The training."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; it must be 0 or more and below 1."
            )
        check_batches(self.data, self.training)
        augmentation = self.augmentation
        channels = self.encoder.in_channels
        if (augmentation.rand_magnitude is not None or augmentation.color_jitter) and channels != 3:
            raise ValueError(
                f"augmentation.rand_magnitude and color_jitter are for images of 3 channels, and "
                f"encoder.in_channels is {channels}: leave them out."
            )
        if self.init == SCRATCH:
            self.encoder.check_channels(self.data.mean)
            config = self.encoder.config(self.data.image_size)  # raises where sizes cannot work
            self.execution.check_stages(len(config.depths))


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """What training starts from."""

    encoder: SwinV2
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: Path | None = None
    """Folder of a trained head, with the names of its classes."""


def starting_point(recipe: ClassificationRecipe) -> StartingPoint:
    """Build the encoder that `recipe.init` asks for, with the normalisation that goes with it.

    Fresh weights depend on the recipe's seed alone.

    Raises:
        ValueError: `recipe.init` is neither an encoder directory nor a run that has ended, or its
            encoder cannot take the sizes.
    """
    size = recipe.data.image_size
    if recipe.init == SCRATCH:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            encoder = build_encoder(recipe.encoder.config(size))
        mean, std = recipe.data.normalisation
        return StartingPoint(encoder=encoder, mean=mean, std=std)
    source = source_of(recipe.init)
    directory = read_encoder_config(source.encoder)
    encoder = load_encoder(
        source.encoder,
        image_size=size,
        window_size=recipe.encoder.window_size,
        drop_path=recipe.encoder.drop_path,
    )
    return StartingPoint(encoder=encoder, mean=directory.mean, std=directory.std, head=source.head)


class ClassificationModule(nn.Module):
    """Cross entropy with label smoothing over batches as they were stored, mixed if asked for."""

    def __init__(
        self,
        model: Classifier,
        start: StartingPoint,
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
        logits = self.model(images, drop_path_chances(self.model.encoder, batch, self.seed))
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


class ClassificationStage:
    """Classification, as the training loop sees it.

    Raises:
        ValueError: the shards have no classes, too few samples, or the start cannot be loaded.
    """

    def __init__(self, recipe: ClassificationRecipe) -> None:
        recipe = replace(recipe, data=with_statistics(recipe.data))
        self.recipe = recipe
        self.bad_samples = recipe.data.bad_samples()
        self.training_shards, self.validation_shards = open_split(recipe.data)
        several = recipe.data.multi_label
        self.classes = self.training_shards.classes if several is None else several.classes
        self.order = order_of(
            self.training_shards, seed=recipe.training.seed, slots=recipe.data.slots
        )
        self.samples_per_epoch = self.order.samples_per_epoch
        self.data_digest = self.training_shards.digest
        self.start = starting_point(recipe)
        recipe.execution.apply(self.start.encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            self.model = Classifier(self.start.encoder, len(self.classes))
        if self.start.head is not None:
            take_head(self.model.head, self.classes, self.start.head)
        self.module = ClassificationModule(
            self.model,
            self.start,
            label_smoothing=recipe.label_smoothing,
            augmentation=recipe.augmentation,
            seed=recipe.training.seed,
        )
        self.depths = self.start.encoder.config.depths

    @property
    def flops_per_sample(self) -> int:
        """Operations of encoder and head; see `simmim.engine.stage.Stage`."""
        config = self.start.encoder.config
        return forward_flops(config) + 2 * config.num_features * len(self.classes)

    @property
    def best_metric(self) -> str | None:
        """Top-1 tells the best checkpoint; of several classes, mean average precision."""
        return "top1" if self.recipe.data.multi_label is None else "mean_average_precision"

    @property
    def probe_every(self) -> int | None:
        """No probe: there are labels already."""
        return None

    def probe(self, accelerator: Accelerator) -> dict[str, float]:
        """Return nothing."""
        del accelerator
        return {}

    def baselines(self) -> dict[str, float]:
        """Return the loss of holding every class for as likely as any other."""
        several = self.recipe.data.multi_label is not None
        return {"uniform_loss": math.log(2 if several else len(self.classes))}

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; see `simmim.engine.loop.Stage`.

        Raises:
            ValueError: images are mixed in pairs, and a micro-batch is odd.
        """
        recipe, training = self.recipe, self.recipe.training
        part = training.batch_size // world // training.accumulation
        if recipe.augmentation.mixes and part % 2:
            raise ValueError(
                f"mixup and cutmix take images in pairs, and a micro-batch holds {part}: change "
                "training.batch_size, training.accumulation or the number of processes."
            )
        augment = None
        if recipe.augmentation.touches_pictures:
            mean, std = self.start.mean, self.start.std
            augment = Augment(settings=recipe.augmentation, mean=mean, std=std)
        return training_batches(
            self.training_shards,
            self.order,
            self.recipe.data,
            self.recipe.training,
            channels=self.start.encoder.config.in_channels,
            augment=augment,
            label=recipe.data.label,
            rank=rank,
            world=world,
            start=start,
            end=end,
            bad_samples=self.bad_samples,
        )

    @torch.no_grad()
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return top-1 and top-5 in percent and the mean cross entropy on held-out images.

        Of images with several classes it is mean average precision, and binary cross entropy.
        Every image counts once, however many ranks there are.
        """
        if self.validation_shards is None:
            return {}
        data, training = self.recipe.data, self.recipe.training
        transform = EvalTransform(
            size=(data.image_size, data.image_size),
            crop_pct=data.crop_pct,
            label=data.label,
            channels=self.start.encoder.config.in_channels,
            max_pixels=data.max_pixels,
        )
        batches = evaluation_batches(
            self.validation_shards,
            transform,
            batch_size=max(accelerator.num_processes, training.batch_size // training.accumulation),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=data.workers,
            bad_samples=self.bad_samples,
        )
        if data.multi_label is not None:
            return multi_label_figures(
                batches,
                lambda images: self.model(self.module.normalise(images)),
                accelerator,
                classes=len(self.classes),
            )
        total = Scores()
        for batch in batches:
            images, labels = batch.images.to(accelerator.device), batch.labels
            assert labels is not None
            with accelerator.autocast():
                logits = self.model(self.module.normalise(images))
            total += score(logits, labels.to(accelerator.device))
        sums = torch.tensor([total.top1, total.top5, total.loss, total.samples])
        top1, top5, loss, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        if not count:
            return {}
        return {
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "validation_loss": loss / count,
        }

    def fresh(self) -> "ClassificationStage":
        """Return a stage of the same recipe, with initial weights on the CPU."""
        return ClassificationStage(self.recipe)

    def look(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw nothing: classification has no pictures."""
        del accelerator, run, step
        return None

    def hand_on(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory and the classifier's head into the run."""
        save_encoder(
            self.start.encoder,
            run.encoder,
            mean=self.start.mean,
            std=self.start.std,
            provenance=Provenance(
                step=step, samples_seen=samples, recipe_hash=recipe_hash(self.recipe)
            ),
        )
        save_head(self.model.head, run.path / HEAD_FOLDER, self.classes)


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
