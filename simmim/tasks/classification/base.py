"""What the stages have in common that tell classes apart: of images, and of clips."""

import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from simmim.data.loader.batches import BatchStream
from simmim.engine.run import RunFolder
from simmim.limits import check_rates
from simmim.recipe import settings
from simmim.tasks.classification.classifier import Classifier, Scores, save_head, score
from simmim.tasks.fine_tuning import Data, FineTuningRecipe, FineTuningStage
from simmim.tasks.pretrained import HEAD_FOLDER, SCRATCH, take_head
from swinv2 import SwinV2Config
from swinv2.config_file import Provenance
from swinv2.flops import forward_flops


@settings
class ClassifyingRecipe(FineTuningRecipe):
    """A linear head on the encoder's average-pooled features, trained with it."""

    init: str = SCRATCH
    """`scratch`, or what to start from: an encoder directory, or the folder of a run that has
    ended. It brings its architecture (variant, patch, channels, sizes) and its mean and std: of
    `encoder` only `window_size` and `drop_path` then apply, and data.mean and data.std do not. A
    classification run, or its native export, brings its head too, where it knows all classes by
    the same names."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes, 0 to below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(self, "label_smoothing")

    @property
    def best_metric(self) -> str:
        """Share of samples whose class has the highest score."""
        return "top1"


Recipe = TypeVar("Recipe", bound=ClassifyingRecipe)


class ClassifyingStage(FineTuningStage[Recipe, Data]):
    """A stage whose model is a `Classifier` of the classes of its data."""

    def __init__(
        self, recipe: Recipe, training: Data, validation: Data | None, classes: tuple[str, ...]
    ) -> None:
        super().__init__(recipe, training, validation)
        self.start = start = recipe.start()
        self.classes = classes
        recipe.execution.apply(start.encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            self.model = Classifier(start.encoder, len(self.classes))
        if start.head is not None:
            take_head(self.model.head, self.classes, start.head)

    @property
    def flops_per_sample(self) -> int:
        """Operations of encoder and head; see `simmim.engine.stage.Stage`."""
        config: SwinV2Config = self.start.encoder.config
        return forward_flops(config) + 2 * config.num_features * len(self.classes)

    def baselines(self) -> dict[str, float]:
        """Return the loss of holding every class for as likely as any other."""
        return {"uniform_loss": math.log(len(self.classes))}

    @torch.no_grad()
    def figures(
        self, batches: BatchStream, accelerator: Accelerator, logits: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return top-1 and top-5 in percent and the mean cross entropy.

        Args:
            batches: this rank's part.
            accelerator: over whose ranks the figures are.
            logits: turns images as they were stored into the scores of the classes.
        """
        total = Scores()
        for batch in batches:
            assert batch.labels is not None
            with accelerator.autocast():
                found = logits(batch.images.to(accelerator.device))
            total += score(found, batch.labels.to(accelerator.device))
        sums = torch.tensor([total.top1, total.top5, total.loss, total.samples])
        top1, top5, loss, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        if not count:
            return {}
        return {
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "validation_loss": loss / count,
        }

    @abstractmethod
    def save_encoder(self, path: Path, provenance: Provenance) -> None:
        """Write the encoder directory."""

    def hand_on(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory and the classifier's head into the run."""
        self.save_encoder(run.encoder, self.provenance(step, samples))
        save_head(self.model.head, run.path / HEAD_FOLDER, self.classes)
