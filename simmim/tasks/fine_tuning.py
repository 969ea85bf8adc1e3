"""The base of all fine-tuning stages.

A new task is a folder with a recipe (`FineTuningRecipe`) and a stage (`FineTuningStage`), which
opens the data, builds the model, transforms samples, validates and exports;
`simmim.tasks.all_tasks` lists it. `ClassifierStage` is the base for classes of whole samples,
`DenseStage` for heads on feature maps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import Self

from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import BatchStream, evaluation_batches
from simmim.data.order.order import Address
from simmim.data.order.source import SampleSource
from simmim.data.transforms.image_transforms import Sample
from simmim.engine.monitor.observers import Watch, pictures, validation
from simmim.engine.run import RunFolder
from simmim.recipe import recipe_hash
from simmim.tasks.architecture import resolve_architecture
from simmim.tasks.loading import order_for, training_batches, with_slots
from simmim.tasks.pretrained import InitialEncoder, load_initial_encoder
from simmim.tasks.recipe import FineTuningRecipe
from swinv2.config_file import Provenance

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
        self.recipe: RecipeT = with_slots(self.resolve(recipe), training)
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

    @abstractmethod
    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write encoder and head into the run."""

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
        return Watch(
            observers=(validates, draws) if self.validates else (draws,),
            flops_per_sample=self.flops_per_sample,
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

    def provenance(self, step: int, samples: int) -> Provenance:
        """Return the provenance to record in the encoder directory."""
        return Provenance(step=step, samples_seen=samples, recipe_hash=recipe_hash(self.recipe))
