"""What the fine-tuning stages have in common.

A new one is a file with a recipe and a stage that extend the two classes here: it opens the data,
builds the model, says how a sample is prepared and what a validation finds, and hands on what was
trained. `simmim.tasks.all_tasks` then names it. Classes of whole samples have
`ClassifierStage` between, places in images `DenseStage`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from torch import nn
from typing_extensions import Self

from simmim.data.datasets.mixture import order_of
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import BatchStream, evaluation_batches
from simmim.data.order.order import Address
from simmim.data.order.source import SampleSource
from simmim.data.transforms.sample import Sample
from simmim.engine.run import RunFolder
from simmim.recipe import recipe_hash
from simmim.tasks.loading import training_batches
from simmim.tasks.pretrained import InitialEncoder, load_initial_encoder
from simmim.tasks.recipe import FineTuningRecipe
from swinv2.config_file import Provenance

Prepare = Callable[[Any, Address], Sample]
"""Makes a sample of what was read at an address."""


RecipeT = TypeVar("RecipeT", bound=FineTuningRecipe)
DataT = TypeVar("DataT", bound=SampleSource[Any])


class FineTuningStage(ABC, Generic[RecipeT, DataT]):
    """A `simmim.engine.stage.Stage` on labelled data; what is left open here is the task's own.

    Args:
        recipe: what is trained, and how.
        training: the samples to train on.
        validation: those that are held out; None for none.
    """

    initial: InitialEncoder[Any]
    """What training starts from."""
    module: nn.Module
    """Takes a Batch on its device and returns the mean loss over it."""
    probe_every: int | None = None
    """No probe: there are labels already."""

    def __init__(self, recipe: RecipeT, training: DataT, validation: DataT | None) -> None:
        self.recipe: RecipeT = recipe
        self.training_shards: DataT = training
        self.validation_shards: DataT | None = validation
        self.bad_samples = recipe.data.bad_samples()
        self.order = order_of(training, seed=recipe.training.seed, slots=recipe.data.slots)
        self.samples_per_epoch = self.order.samples_per_epoch
        self.data_digest = training.digest

    @staticmethod
    def resolve(recipe: RecipeT) -> RecipeT:
        """Return the recipe as a run of it keeps it, with measured values filled in.

        Raises:
            ValueError: they were not measured.
        """
        return recipe

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
    def best_metric(self) -> str:
        """The figure of validation that tells the best checkpoint."""
        return self.recipe.best_metric

    @property
    def encoder(self) -> Any:
        """The encoder that is trained."""
        return self.initial.encoder

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each encoder stage."""
        depths: tuple[int, ...] = self.initial.encoder.config.depths
        return depths

    @property
    @abstractmethod
    def flops_per_sample(self) -> int:
        """Operations of the matrix products in a forward pass over one sample."""

    @abstractmethod
    def training_transform(self) -> Prepare:
        """Return what makes a sample as training sees it."""

    @abstractmethod
    def validation_transform(self) -> Prepare:
        """Return what makes a sample as validation sees it."""

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
        """Return this rank's part of the held-out samples: every one once over all ranks.

        Args:
            transform: makes a sample; by default `validation_transform`.
            at_a_time: samples that all ranks take together; None takes as many as training does.
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

    @abstractmethod
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return figures on held-out samples, the same on every rank; empty if there are none."""

    @abstractmethod
    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write encoder and head into the run."""

    def probe(self, accelerator: Accelerator) -> dict[str, float]:
        """Return nothing."""
        del accelerator
        return {}

    def baselines(self) -> dict[str, float]:
        """Return nothing, unless some answer without learning has a loss that tells."""
        return {}

    def visualize(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw nothing, unless there is something to see."""
        del accelerator, run, step
        return None

    def fresh(self) -> Self:
        """Return a stage of the same recipe, with initial weights on the CPU."""
        make: Callable[[RecipeT], Self] = type(self)
        return make(self.recipe)

    def provenance(self, step: int, samples: int) -> Provenance:
        """Return what an encoder directory says of where its weights come from."""
        return Provenance(step=step, samples_seen=samples, recipe_hash=recipe_hash(self.recipe))
