"""The base of segmentation and detection: a head of transformers on the encoder."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.channels import ChannelNames
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import BatchStream, picture_batches
from simmim.engine.generators import seeded
from simmim.engine.loop import nonzero
from simmim.engine.run import RunFolder
from simmim.tasks.features import Normalise, sample_drop_path_noise
from simmim.tasks.fine_tuning import DataT, FineTuningStage
from simmim.tasks.pretrained import InitialEncoder
from simmim.tasks.segmentation.heads import check_installed, passing_noise, seeds_of
from simmim.tasks.segmentation.overlays import palette, write_panel
from simmim.tasks.segmentation.recipe import DenseRecipe
from simmim.tasks.trained import TrainedModel, WrittenHead
from swinv2 import SwinV2, save_encoder
from swinv2.atomic import atomic_folder
from swinv2.bridges.transformers_backbone import encoder_from_backbone, register_backbone
from swinv2.bridges.verification import compare
from swinv2.flops import forward_flops
from swinv2.weights import load_strictly

PREPROCESSING = "preprocessing.json"
"""File next to the model with the mean, std and channel names of its images."""


def save_dense(
    net: Any,
    folder: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    channels: ChannelNames | None,
) -> None:
    """Write encoder and head for `from_pretrained`, and mean, std and channel names of images.

    Call `swinv2.bridges.transformers_backbone.register_backbone` before `from_pretrained`.
    """
    _hide_progress()
    with atomic_folder(folder, may_replace=_is_dense) as written:
        net.save_pretrained(written)
        described = {"mean": list(mean), "std": list(std), "channels": channels}
        text = json.dumps(described, indent=1)
        (written / PREPROCESSING).write_text(text + "\n", encoding="utf-8")


def load_dense(folder: Path) -> Any:
    """Load a model written by `save_dense`, on the CPU, in evaluation mode.

    Raises:
        ValueError: transformers is not installed, or the folder has no such model.
    """
    check_installed()
    register_backbone()
    from transformers import (  # noqa: PLC0415 - an optional part
        Mask2FormerForUniversalSegmentation,
        RTDetrForObjectDetection,
        UperNetForSemanticSegmentation,
    )

    known: tuple[Any, ...] = (
        Mask2FormerForUniversalSegmentation,
        RTDetrForObjectDetection,
        UperNetForSemanticSegmentation,
    )
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        (model,) = (one for one in known if [one.__name__] == named)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{folder} has no segmentation or detection model: give the folder of that name in a "
            "finished run."
        ) from None
    _hide_progress()
    return model.from_pretrained(folder).eval()


def _hide_progress() -> None:
    """Turn off transformers' progress bars, which would mix with our output."""
    from transformers.utils import logging  # noqa: PLC0415 - an optional part

    logging.disable_progress_bar()


def flat_output(output: Any) -> Tensor:
    """Return a model's class logits, and masks or boxes, flattened into one tensor."""
    names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    parts = [output[name].float().flatten() for name in names if output.get(name) is not None]
    return torch.cat(parts)


def _is_dense(path: Path) -> bool:
    return (path / PREPROCESSING).is_file()


def count_flops(net: Any, backbone: Any, side: int) -> int:
    """Return the FLOPs of the matrix products in a forward pass over one square image.

    The encoder's are computed from its sizes, the head's counted on a copy on the meta device.
    """
    encoder = backbone.encoder
    backbone.encoder = _EmptyMaps(encoder)
    try:
        head = deepcopy(net).to("meta").eval()
    finally:
        backbone.encoder = encoder
    images = torch.empty(1, encoder.config.in_channels, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(pixel_values=images)
    return forward_flops(encoder.config) + int(counter.get_total_flops())


class _EmptyMaps(nn.Module):
    """A stand-in for the encoder that returns feature maps of the right shapes without values."""

    def __init__(self, encoder: SwinV2) -> None:
        super().__init__()
        self.sizes = list(zip(encoder.config.stage_dims, encoder.strides, strict=True))

    def features(self, images: Tensor, drop_path_noise: Tensor | None = None) -> list[Tensor]:
        del drop_path_noise
        count, _, height, width = images.shape
        return [
            images.new_empty(count, dim, -(-height // stride), -(-width // stride))
            for dim, stride in self.sizes
        ]


RecipeT = TypeVar("RecipeT", bound=DenseRecipe)


class DenseModule(nn.Module):
    """The loss of a model over stored batches."""

    def __init__(
        self,
        model: Any,
        initial: InitialEncoder[SwinV2],
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.normalise = Normalise(initial.mean, initial.std)

    def forward(self, batch: Batch, normalisers: Tensor | None = None) -> Tensor:
        """Return the loss of a batch.

        Args:
            batch: the images and their targets.
            normalisers: what the terms of the loss are divided by, if the batch is a part of a
                larger one; None for those of the batch.
        """
        images, targets = self.normalise(batch.images, batch.flips), batch.targets
        if normalisers is None:
            normalisers = nonzero(self.model.normalisers(targets)).to(images.device)
        noise = sample_drop_path_noise(self.model.backbone.encoder, batch, self.seed)
        with passing_noise(self.model.backbone, noise):
            loss: Tensor = self.model.loss(
                images, targets, seeds=seeds_of(batch, self.seed), normalisers=normalisers
            )
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
        recipe = self.recipe
        self.names = names
        seed = recipe.training.seed
        initial = self.load_initial(recipe)
        with seeded(seed):
            self.model = self.build_model(recipe, initial.encoder, names)
        recipe.data.check_bands(initial.encoder.config.in_channels)
        self.initial = replace(initial, encoder=self.model.backbone.encoder)
        # Before sharding: sharded modules cannot be copied.
        self._flops = count_flops(self.model.net, self.model.backbone, recipe.data.image_size)
        recipe.execution.apply(self.initial.encoder)
        self.module = DenseModule(self.model, self.initial, seed=seed)

    @staticmethod
    @abstractmethod
    def build_model(recipe: RecipeT, encoder: SwinV2, names: Sequence[str]) -> Any:
        """Build the model, with a copy of the encoder and a randomly initialised head.

        The model has `net`, the model of transformers; `backbone`, the encoder in it;
        `normalisers(targets)`, what the terms of its loss are divided by; and
        `loss(images, targets, seeds, normalisers)` of normalised images, with a seed for each.

        Args:
            recipe: the recipe, with the settings of the head.
            encoder: the encoder to copy.
            names: class names.

        Raises:
            ValueError: a package is not installed, or the encoder does not fit the head.
        """

    def normalisers(self, batch: Batch) -> Tensor:
        """Return numbers of pixels or objects; see `simmim.engine.stage.TrainingStage`."""
        counts: Tensor = self.model.normalisers(batch.targets)
        return counts

    @property
    def flops_per_sample(self) -> int:
        """FLOPs of encoder and head; see `simmim.engine.monitor.observers.Watch`."""
        return self._flops

    @property
    def pictured(self) -> DataT:
        """The images of which pictures are drawn: those held out, or else those trained on."""
        return self.training_shards if self.validation_shards is None else self.validation_shards

    def pictured_batches(self, *, at_a_time: int) -> BatchStream:
        """Return the images of which pictures are drawn, spread over the set."""
        return picture_batches(
            self.pictured,
            self.validation_transform(),
            count=self.recipe.pictures,
            batch_size=at_a_time,
            bad_samples=self.bad_samples,
        )

    @abstractmethod
    def picture_rows(
        self, accelerator: Accelerator, colours: np.ndarray
    ) -> Iterator[list[np.ndarray]]:
        """Yield a row of pictures for each image, one per caption, given class colours."""

    @torch.no_grad()
    def visualize(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw held-out images, or else training images, with labels and predictions."""
        if not self.recipe.pictures:
            return None
        self.module.eval()
        colours = palette(len(self.names))
        rows = list(self.picture_rows(accelerator, colours))
        if not rows:  # all of them are damaged
            return None
        path = run.reconstructions / f"step-{step:08d}.png"
        captions = list(self.captions)
        if self.validation_shards is None:
            captions[0] = f"{captions[0]} (training)"
        write_panel(rows, captions, list(zip(self.names, colours, strict=True)), path)
        return path

    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory, and encoder and head in transformers' format."""
        mean, std = self.initial.mean, self.initial.std
        encoder = encoder_from_backbone(self.model.backbone)
        provenance = self.provenance(step, samples)
        save_encoder(
            encoder,
            run.encoder,
            mean=mean,
            std=std,
            channels=self.initial.channels,
            provenance=provenance,
        )
        channels = self.recipe.data.wanted_channels
        folder = run.path / self.recipe.task
        save_dense(self.model.net, folder, mean=mean, std=std, channels=channels)

    @classmethod
    def with_weights(
        cls, found: TrainedModel, recipe: Any, run: RunFolder, tensors: Mapping[str, Tensor]
    ) -> TrainedModel:
        """Return a model with encoder and head in one network; see `FineTuningStage`."""
        del run
        assert isinstance(found.encoder, SwinV2)
        with torch.random.fork_rng(devices=[]):
            model = cls.build_model(recipe, found.encoder, cls.class_names(recipe))
        load_strictly(model, tensors, found.origin)
        return replace(
            found,
            encoder=encoder_from_backbone(model.backbone),
            head=DenseHead(task=recipe.task, folder=recipe.task, net=model.net.eval),
        )

    @classmethod
    def with_head(cls, found: TrainedModel, folder: Path) -> TrainedModel:
        """Return a model with the network in a folder; see `FineTuningStage`."""
        name = folder.name
        return replace(
            found, head=DenseHead(task=name, folder=name, net=partial(load_dense, folder))
        )


README_LINES = """
With its head, and transformers installed:

```python
from swinv2.bridges.transformers_backbone import register_backbone
from transformers import {name}

register_backbone()
model = {name}.from_pretrained("{folder}")
```
"""


@dataclass(frozen=True, kw_only=True)
class DenseHead:
    """Encoder and head of segmentation or detection, as one model of transformers."""

    task: str
    folder: str
    net: Callable[[], Any]
    """Returns the model, in evaluation mode."""

    def write(self, folder: Path, model: TrainedModel, images: Tensor) -> WrittenHead:
        """Write the model, and compare its outputs; see `TrainedHead`."""
        net, place = self.net(), folder / self.folder
        save_dense(net, place, mean=model.mean, std=model.std, channels=model.channels)
        architecture = type(net).__name__
        with torch.no_grad():
            ours, loaded = net(pixel_values=images), load_dense(place)(pixel_values=images)
        # Convolutions may round differently from call to call, so the tolerance is not 0.
        outputs = flat_output(ours), flat_output(loaded)
        return WrittenHead(
            line="encoder and head, for transformers",
            comparison=compare(f"{architecture} after loading", *outputs),
            readme=README_LINES.format(name=architecture, folder=self.folder),
        )
