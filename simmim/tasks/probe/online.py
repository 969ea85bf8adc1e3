"""The online probe: frozen features are evaluated on labelled images during pretraining.

The images are split over the ranks, and each classifies its part.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from simmim.data.datasets.mixture import Shards
from simmim.data.datasets.opening import open_sets
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import evaluation_batches
from simmim.data.settings import DataSettings
from simmim.data.transforms.image_transforms import EvalTransform
from simmim.tasks.loading import open_labelled
from simmim.tasks.metrics import accuracy_sums, gather_rows
from simmim.tasks.probe.probe import (
    LabelledFeatures,
    knn_votes,
    linear_logits,
    standardise,
)
from simmim.tasks.probe.recipe import OnlineProbeSettings


class OnlineProbe:
    """The online probe of a pretraining.

    Args:
        settings: settings of the probe.
        size: channels, height and width of the encoder's input.
        width: number of features per image.
        data: data settings of the pretraining, for reading images.

    Raises:
        ValueError: the shards cannot be read, are not labelled, or have different classes.
    """

    def __init__(
        self,
        settings: OnlineProbeSettings,
        size: tuple[int, int, int],
        *,
        width: int,
        data: DataSettings,
    ) -> None:
        self.settings, self.size, self.width, self.data = settings, size, width, data
        known, asked = open_labelled(
            open_sets(settings.shards, data.remote_reading),
            validation=None
            if settings.validation is None
            else open_sets(settings.validation, data.remote_reading),
            validation_shards=settings.validation_shards,
            fraction=1.0,
            seed=0,
        )
        assert asked is not None
        self.classes = known.classes
        self.known = subsample(known, settings.samples)
        self.asked = subsample(asked, settings.validation_samples)

    def run(
        self, features: Callable[[Batch], Tensor], accelerator: Accelerator
    ) -> dict[str, float]:
        """Return top-1 accuracy in percent.

        Args:
            features: maps a batch on its device to (batch, num_features); called as often on each
                rank.
            accelerator: devices and processes.
        """
        mine = self._features(self.known, features, accelerator)
        everyone = LabelledFeatures(
            values=gather_rows(mine.values, accelerator),
            labels=gather_rows(mine.labels, accelerator),
        )
        real = everyone.labels >= 0
        known = LabelledFeatures(values=everyone.values[real], labels=everyone.labels[real])
        asked = self._features(self.asked, features, accelerator)
        known, asked = standardise(known, asked)
        guesses = self._guesses(known, asked.values)
        hits = [
            accuracy_sums(guess, asked.labels).top1 if len(guess) else 0.0
            for guess in guesses.values()
        ]
        sums = torch.tensor([*hits, float(len(asked.labels))], device=accelerator.device)
        *right, count = accelerator.reduce(sums, "sum").tolist()
        if not count:
            return {}
        return {
            f"probe_{name}_top1": 100 * found / count
            for name, found in zip(guesses, right, strict=True)
        }

    def _guesses(self, known: LabelledFeatures, asked: Tensor) -> dict[str, Tensor]:
        classifier, kind = self.settings.classifier, self.settings.kind
        guesses: dict[str, Tensor] = {}
        if kind != "linear":
            guesses["knn"] = knn_votes(
                known,
                asked,
                num_classes=len(self.classes),
                neighbours=classifier.neighbours,
                temperature=classifier.temperature,
            )
        if kind != "knn":
            with torch.enable_grad():
                guesses["linear"] = linear_logits(
                    known, asked, num_classes=len(self.classes), steps=classifier.linear_steps
                )
        return guesses

    def _features(
        self, shards: Shards, features: Callable[[Batch], Tensor], accelerator: Accelerator
    ) -> LabelledFeatures:
        """Return the features of this rank's part of the images."""
        transform = EvalTransform(size=self.size[1:], channels=self.size[0], data=self.data)
        batches = evaluation_batches(
            shards,
            transform,
            batch_size=self.settings.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.data.workers,
            bad_samples=BadSamples(max_share=1.0),  # they are not part of training
        )
        # A rank may have no batch.
        values = [torch.zeros(0, self.width, device=accelerator.device)]
        labels = [torch.zeros(0, dtype=torch.int64, device=accelerator.device)]
        for stored in batches:
            batch = stored.to(accelerator.device)
            assert batch.labels is not None
            with accelerator.autocast():
                values.append(features(batch).float())
            labels.append(batch.labels)
        return LabelledFeatures(values=torch.cat(values), labels=torch.cat(labels))


def subsample(shards: Shards, samples: int) -> Shards:
    """Return at most about this many samples, the same fraction of each class."""
    return shards if shards.samples <= samples else shards.share(samples / shards.samples, seed=0)
