"""The base of all fine-tuning stages.

A new task is a folder with a recipe (`FineTuningRecipe`), a stage (`FineTuningStage`), which opens
the data, builds the model, transforms samples, validates and exports, and a `Task` that names both;
`simmim.tasks.all_tasks` lists it. tests/simmim/tasks/test_toy_task.py has one in a single file.
`ClassifierStage` is the base for classes of whole samples, `DenseStage` for heads on feature maps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import Self

from simmim.data.channels import with_channels
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import BatchStream, evaluation_batches
from simmim.data.order.order import Address
from simmim.data.order.source import SampleSource
from simmim.data.transforms.image_transforms import Sample
from simmim.engine.checkpoint.directory import load_state
from simmim.engine.checkpoint.resume import read_weights
from simmim.engine.monitor.hardware import BACKWARD
from simmim.engine.monitor.observers import Watch, pictures, validation
from simmim.engine.run import RunFolder
from simmim.recipe import recipe_hash
from simmim.tasks.architecture import resolve_architecture
from simmim.tasks.loading import order_for, training_batches, with_slots
from simmim.tasks.other_encoder import checkpoint_notes, save_any_encoder
from simmim.tasks.pretrained import InitialEncoder, load_initial_encoder
from simmim.tasks.recipe import FineTuningRecipe
from simmim.tasks.trained import (
    MODEL_PREFIX,
    PlainHead,
    TrainedModel,
    below,
    provenance_of,
    read_directory,
    read_plain_head,
    save_plain_head,
)
from swinv2.bridges.preprocessing import Preparation
from swinv2.config_file import Provenance
from swinv2.weights import load_strictly

ENCODER_PREFIX = "encoder."
"""Prefix of the encoder in the names of a fine-tuned model's tensors."""

Prepare = Callable[[Any, Address], Sample]
"""A transform: turns an encoded sample and its address into a sample."""


RecipeT = TypeVar("RecipeT", bound=FineTuningRecipe)
DataT = TypeVar("DataT", bound=SampleSource[Any])


class FineTuningStage(ABC, Generic[RecipeT, DataT]):
    """A `simmim.engine.stage.TrainingStage` on labelled data; tasks fill in the abstract methods.

    Args:
        recipe: the recipe.
        training: training samples.
        validation: held-out samples; None for none.
    """

    initial: InitialEncoder[Any]
    """The encoder that training starts from."""
    module: nn.Module
    """Takes a Batch on its device and returns the mean loss over it."""

    def __init__(self, recipe: RecipeT, training: DataT, validation: DataT | None) -> None:
        named = with_channels(
            self.resolve(recipe),
            {"training set": training, "held-out set": validation},
            asked=recipe.asks_for_channels,
            trained=_weights_in_messages(recipe),
        )
        self.recipe: RecipeT = with_slots(named, training)
        self.training_shards: DataT = training
        self.validation_shards: DataT | None = validation
        self.bad_samples = recipe.data.bad_samples()
        self.order = order_for(self.recipe, training)

    @staticmethod
    def resolve(recipe: RecipeT) -> RecipeT:
        """Return the recipe as a run of it records it: with the architecture that is trained.

        Raises:
            ValueError: the encoder that it starts from or is compared with cannot be used.
        """
        return resolve_architecture(recipe)

    @staticmethod
    def load_initial(recipe: RecipeT) -> InitialEncoder[Any]:
        """Build the encoder that `init` asks for; see `load_initial_encoder`."""
        return load_initial_encoder(recipe.init, recipe.encoder, recipe.data, recipe.training.seed)

    @staticmethod
    @abstractmethod
    def class_names(recipe: RecipeT) -> tuple[str, ...]:
        """Return the names of the classes in the data.

        Raises:
            ValueError: the data cannot be read.
        """

    @property
    def encoder(self) -> Any:
        """The encoder that is trained."""
        return self.initial.encoder

    @property
    @abstractmethod
    def flops_per_sample(self) -> int:
        """FLOPs of the matrix products in a forward pass over one sample."""

    @abstractmethod
    def training_transform(self) -> Prepare:
        """Return the transform of training samples."""

    @abstractmethod
    def validation_transform(self) -> Prepare:
        """Return the transform of validation samples."""

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches, from `start` to `end` samples of the global stream."""
        return training_batches(
            self.training_shards,
            self.order,
            self.training_transform(),
            self.recipe.data,
            self.recipe.training,
            rank=rank,
            world=world,
            start=start,
            end=end,
            bad_samples=self.bad_samples,
        )

    def held_out(
        self,
        transform: Prepare | None = None,
        *,
        at_a_time: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> BatchStream:
        """Return batches of this rank's part of the held-out samples, each once over all ranks.

        Args:
            transform: transform of the samples; None is `validation_transform`.
            at_a_time: batch size over all ranks; None is the one of training.
            rank: number of this process.
            world: number of processes.
        """
        assert self.validation_shards is not None
        training = self.recipe.training
        if at_a_time is None:
            at_a_time = training.batch_size // training.accumulation
        return evaluation_batches(
            self.validation_shards,
            transform or self.validation_transform(),
            batch_size=max(world, at_a_time),
            rank=rank,
            world=world,
            workers=self.recipe.data.workers,
            bad_samples=self.bad_samples,
        )

    @property
    def validates(self) -> bool:
        """Whether there is validation data."""
        return self.validation_shards is not None

    @abstractmethod
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return metrics on held-out samples, the same on every rank; empty if there are none."""

    @property
    def checkpoint_notes(self) -> dict[str, str]:
        """Description of an encoder that is not a SwinV2."""
        initial = self.initial
        return checkpoint_notes(self.encoder, initial.mean, initial.std, initial.channels)

    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write encoder and head into the run; by default only the weights of the head."""
        mean, std = self.initial.mean, self.initial.std
        provenance = self.provenance(step, samples)
        channels = self.initial.channels
        save_any_encoder(
            self.encoder, run.encoder, mean=mean, std=std, channels=channels, provenance=provenance
        )
        folder = self.recipe.HEAD
        if folder is not None:
            tensors = below(self.module.state_dict(), MODEL_PREFIX)
            save_plain_head(run.path / folder, _without_encoder(tensors))

    @classmethod
    def read_trained(
        cls, run: RunFolder, read_recipe: Callable[[], Any], checkpoint: Path | None
    ) -> TrainedModel:
        """Read the model of a run; if it has finished, without the weights that it started from.

        Args:
            run: the run.
            read_recipe: reads its recipe, or that of the checkpoint.
            checkpoint: the checkpoint; None for the run's own export.

        Raises:
            ValueError: a file is missing, damaged, or does not fit the recipe.
        """
        recipe = read_recipe()
        shards = recipe.data.first_shards
        ended = read_directory(run.encoder) if run.encoder.is_dir() else None
        if ended is not None and (
            checkpoint is None or load_state(checkpoint).step == ended.provenance.step
        ):
            folder = recipe.HEAD
            whole = ended
            if folder is not None and (run.path / folder).is_dir():
                whole = cls.with_head(ended, run.path / folder)
            crop = Preparation(crop_pct=recipe.validation_crop)
            prepared = replace(whole, preparation=whole.preparation or crop)
            return replace(prepared, shards=shards, image_channels=recipe.data.fallback_channels)
        assert checkpoint is not None
        found = replace(
            ended or cls._initial_model(recipe),
            provenance=provenance_of(checkpoint, recipe),
            preparation=Preparation(crop_pct=recipe.validation_crop),
            shards=shards,
            image_channels=recipe.data.fallback_channels,
            origin=str(checkpoint),
        )
        tensors = below(read_weights(checkpoint), MODEL_PREFIX)
        return cls.with_weights(found, recipe, run, tensors)

    @classmethod
    def _initial_model(cls, recipe: Any) -> TrainedModel:
        """Return the initial encoder of a run that has not exported one yet."""
        initial = cls.load_initial(recipe)
        return TrainedModel(
            encoder=initial.encoder,
            mean=initial.mean,
            std=initial.std,
            channels=initial.channels,
            provenance=Provenance(),
            inflated_from=initial.inflated_from,
            origin=recipe.init,
        )

    @classmethod
    def with_weights(
        cls, found: TrainedModel, recipe: Any, run: RunFolder, tensors: Mapping[str, Tensor]
    ) -> TrainedModel:
        """Return a model with encoder and head of a checkpoint; by default the head as weights.

        Args:
            found: the model with the encoder that the run started from or has exported.
            recipe: the recipe of the checkpoint.
            run: the run.
            tensors: weights of the stage's model, by name.
        """
        del run
        load_strictly(found.encoder, below(tensors, ENCODER_PREFIX), found.origin)
        folder = recipe.HEAD
        head = None
        if folder is not None:
            rest = _without_encoder(tensors)
            head = PlainHead(task=recipe.task, folder=folder, tensors=rest)
        return replace(found, encoder=found.encoder.eval(), head=head)

    @classmethod
    def with_head(cls, found: TrainedModel, folder: Path) -> TrainedModel:
        """Return a model with the head that a finished run or a native export has in a folder."""
        return replace(found, head=read_plain_head(folder, folder.name))

    def normalisers(self, batch: Batch) -> Tensor | None:
        """Return None: by default the loss is a mean over samples."""
        del batch
        return None

    @property
    def watch(self) -> Watch:
        """Validation, whose metric selects the best checkpoint, and pictures."""
        training = self.recipe.training
        validates = validation(
            self.validate, every=training.validate_every, best_metric=self.recipe.best_metric
        )
        draws = pictures(self.visualize, every=training.look_every)
        frozen = training.optimizer.freeze == "all"
        # Training counts a backward pass on top, which a frozen encoder has not.
        flops = self.flops_per_sample // (1 + BACKWARD if frozen else 1)
        return Watch(
            observers=(validates, draws) if self.validates else (draws,),
            flops_per_sample=flops,
            baselines=self.baselines,
        )

    def baselines(self) -> dict[str, float]:
        """Return losses of trivial predictions; by default none."""
        return {}

    def visualize(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw pictures of validation samples; by default none."""
        del accelerator, run, step
        return None

    def fresh(self) -> Self:
        """Return a stage of the same recipe, with initial weights on the CPU."""
        make: Callable[[RecipeT], Self] = type(self)
        return make(self.recipe)

    def class_counts(self) -> Mapping[str, int] | None:
        """Return the number of training samples of each class; None if they have no single one."""
        return None

    @property
    def evaluated_sources(self) -> Mapping[str, SampleSource[Any] | None]:
        """Other samples than those trained on that the encoder gets, by what they are."""
        return {"held-out images": self.validation_shards}

    def provenance(self, step: int, samples: int) -> Provenance:
        """Return the provenance to record in the encoder directory."""
        return Provenance(step=step, samples_seen=samples, recipe_hash=recipe_hash(self.recipe))


def _weights_in_messages(recipe: FineTuningRecipe) -> str | None:
    """Return what messages call the weights whose channels are trained; None for random ones."""
    source = recipe.architecture_source
    return None if source is None else f"the encoder of {source}"


def _without_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one for name, one in tensors.items() if not name.startswith(ENCODER_PREFIX)}
