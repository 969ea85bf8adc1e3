"""The base of segmentation and detection: a head of transformers on the encoder."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.engine.run import RunFolder
from simmim.tasks.features import Normalise, sample_drop_path_noise
from simmim.tasks.fine_tuning import DataT, FineTuningStage
from simmim.tasks.pretrained import InitialEncoder
from simmim.tasks.segmentation.backbone import passing_noise, seeded_by
from simmim.tasks.segmentation.overlays import palette, write_panel
from simmim.tasks.segmentation.recipe import DenseRecipe
from simmim.tasks.segmentation.save_heads import count_flops, save_dense
from swinv2 import SwinV2, save_encoder
from swinv2.bridges.transformers_backbone import encoder_from_backbone

RecipeT = TypeVar("RecipeT", bound=DenseRecipe)


class DenseModule(nn.Module):
    """The loss of a model over stored batches."""

    def __init__(
        self,
        model: Any,
        initial: InitialEncoder[SwinV2],
        targets: Callable[[Batch], Any],
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.targets = targets
        self.seed = seed
        self.normalise = Normalise(initial.mean, initial.std)

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        images = self.normalise(batch.images, batch.flips)
        noise = sample_drop_path_noise(self.model.backbone.encoder, batch, self.seed)
        with passing_noise(self.model.backbone, noise), seeded_by(batch, self.seed):
            loss: Tensor = self.model.loss(images, self.targets(batch))
            return loss


class DenseStage(FineTuningStage[RecipeT, DataT]):
    """A stage with a model of transformers.

    Args:
        recipe: the recipe.
        training: training images.
        validation: held-out images; None for none.
        names: class names.
    """

    initial: InitialEncoder[SwinV2]
    model: Any
    """The model from `build_model`."""
    module: DenseModule
    captions: Sequence[str]
    """Captions of the columns of pictures."""

    def __init__(
        self, recipe: RecipeT, training: DataT, validation: DataT | None, names: Sequence[str]
    ) -> None:
        super().__init__(recipe, training, validation)
        self.names = names
        seed = recipe.training.seed
        initial = self.load_initial(recipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = self.build_model(recipe, initial.encoder, names)
        self.initial = replace(initial, encoder=self.model.backbone.encoder)
        # Before sharding: sharded modules cannot be copied.
        self._flops = count_flops(self.model.net, self.model.backbone, recipe.data.image_size)
        recipe.execution.apply(self.initial.encoder)
        self.module = DenseModule(self.model, self.initial, self.targets_of, seed=seed)

    @staticmethod
    @abstractmethod
    def build_model(recipe: RecipeT, encoder: SwinV2, names: Sequence[str]) -> Any:
        """Build the model, with a copy of the encoder and a randomly initialised head.

        The model has `net`, the model of transformers; `backbone`, the encoder in it; and
        `loss(images, targets)` of normalised images.

        Args:
            recipe: the recipe, with the settings of the head.
            encoder: the encoder to copy.
            names: class names.

        Raises:
            ValueError: a package is not installed, or the encoder does not fit the head.
        """

    @staticmethod
    def targets_of(batch: Batch) -> Any:
        """Return the targets for the model's loss."""
        return batch.targets

    @property
    def flops_per_sample(self) -> int:
        """FLOPs of encoder and head; see `simmim.engine.stage.Stage`."""
        return self._flops

    @abstractmethod
    def drawn(self, accelerator: Accelerator, colours: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Yield a row of pictures for each held-out image, one per caption, given class colours."""

    @torch.no_grad()
    def visualize(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw held-out images with labels and predictions."""
        if self.validation_shards is None or not self.recipe.pictures:
            return None
        self.module.eval()
        colours = palette(len(self.names))
        with closing(self.drawn(accelerator, colours)) as drawn:  # type: ignore[type-var]
            rows = list(islice(drawn, self.recipe.pictures))
        path = run.reconstructions / f"step-{step:08d}.png"
        write_panel(rows, self.captions, list(zip(self.names, colours, strict=True)), path)
        return path

    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory, and encoder and head in transformers' format."""
        mean, std = self.initial.mean, self.initial.std
        encoder = encoder_from_backbone(self.model.backbone)
        provenance = self.provenance(step, samples)
        save_encoder(encoder, run.encoder, mean=mean, std=std, provenance=provenance)
        save_dense(self.model.net, run.path / self.recipe.task, mean=mean, std=std)
