"""SimMIM pretraining on unlabelled images: the stage that the training loop runs."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.channels import check_channels, with_channels
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import BatchStream, evaluation_batches, picture_batches
from simmim.data.order.source import SampleSource
from simmim.data.settings import DataSettings
from simmim.data.transforms.image_transforms import EvalTransform, TrainTransform
from simmim.engine.checkpoint.adapting import trained_channels
from simmim.engine.checkpoint.directory import (
    RECIPE_FILE,
    TrainingState,
    check_small_files,
    find_checkpoint,
    load_state,
)
from simmim.engine.checkpoint.ema import load_average
from simmim.engine.checkpoint.resume import ENCODER, load_model, read_weights
from simmim.engine.monitor.hardware import BACKWARD
from simmim.engine.monitor.observers import Watch, pictures, probe, validation
from simmim.engine.run import RunFolder
from simmim.method.encoder_protocol import encoder_flops
from simmim.method.masking import MaskGenerator
from simmim.method.model import SimMIM
from simmim.recipe import load, read_values, recipe_hash
from simmim.report.panels import reconstruction_panel
from simmim.tasks.features import Normalise, pooled_features, sample_drop_path_noise
from simmim.tasks.loading import order_for, training_batches, with_slots
from simmim.tasks.measured import with_measured
from simmim.tasks.other_encoder import checkpoint_notes, save_any_encoder
from simmim.tasks.pretrain.model import EncoderBuilder, build_model, build_swinv2
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.probe.online import OnlineProbe
from simmim.tasks.trained import (
    FEATURE_DECODER,
    TrainedModel,
    below,
    masked_image_of,
    provenance_of,
    read_directory,
)
from swinv2.config_file import Provenance
from swinv2.method_file import MethodTensors
from swinv2.weights import load_strictly

PANEL_IMAGES = 8
BASELINE_IMAGES = 256
"""Held-out images for the baseline, which is computed before training."""


class PretrainModule(nn.Module):
    """SimMIM over stored batches: images are flipped and normalised on the device."""

    def __init__(self, model: SimMIM[Any], data: DataSettings, *, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.normalise = Normalise(*data.normalisation)

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        assert batch.masks is not None
        images = self.normalise(batch.images, batch.flips)
        noise = sample_drop_path_noise(self.model.encoder, batch, self.seed)
        loss: Tensor = self.model(images, batch.masks, noise).loss
        return loss

    def features(self, batch: Batch) -> Tensor:
        """Return the pooled features of whole images, (batch, num_features)."""
        images = self.normalise(batch.images, batch.flips)
        return pooled_features(self.model.encoder, images)


class PretrainStage:
    """SimMIM pretraining, as the training loop sees it.

    Args:
        recipe: the recipe.
        encoder: builds the encoder; by default the Swin Transformer V2 that the recipe describes.
            Of another, the recipe's section `encoder` has patch_size and in_channels.
    """

    def __init__(self, recipe: PretrainRecipe, encoder: EncoderBuilder = build_swinv2) -> None:
        self.build_encoder = encoder
        recipe = with_measured(recipe)
        self.bad_samples = recipe.data.bad_samples()
        self.training_shards, self.validation_shards = recipe.data.open_images()
        asked = recipe.asks_for_channels
        sources = {"data.shards": self.training_shards, "held-out set": self.validation_shards}
        named = with_channels(recipe, sources, asked=asked)
        named.data.check_bands(recipe.encoder.in_channels)
        self.recipe = recipe = with_slots(named, self.training_shards)
        self.order = order_for(recipe, self.training_shards)
        self.model = build_model(recipe, encoder)
        recipe.execution.apply(self.model.encoder)
        self.module = PretrainModule(self.model, recipe.data, seed=recipe.training.seed)
        self.encoder = self.model.encoder
        self.flops_per_sample = self._count_flops()
        size = (recipe.data.image_size, recipe.data.image_size)
        self.draw_mask = MaskGenerator.from_settings(recipe.mask, size)
        self.online_probe = None
        if recipe.probe is not None:
            shape = (recipe.encoder.in_channels, *size)
            self.online_probe = OnlineProbe(
                recipe.probe, shape, width=self.model.encoder.num_features, data=recipe.data
            )
            check_channels(
                {"probe.shards": self.online_probe.known, "probe set": self.online_probe.asked},
                recipe.data,
                recipe.data.channels,
                asked=asked,
                trained="the encoder of this training",
            )

    @property
    def evaluated_sources(self) -> dict[str, SampleSource[Any] | None]:
        """Other images than those trained on that the encoder gets, by what they are."""
        probe = self.online_probe
        return {
            "held-out images": self.validation_shards,
            "probe.shards": None if probe is None else probe.known,
        }

    def class_counts(self) -> None:
        """Return None: the images have no labels."""

    @classmethod
    def read_trained(
        cls, run: RunFolder, read_recipe: Callable[[], PretrainRecipe], checkpoint: Path | None
    ) -> TrainedModel:
        """Read encoder, mask token and decoder of a run; see `FineTuningStage.read_trained`."""
        recipe = read_recipe()
        shards, named = recipe.data.first_shards, recipe.data.fallback_channels
        if checkpoint is None:
            found = read_directory(run.encoder)
            return replace(found, shards=shards, image_channels=named)
        if recipe.frozen_encoder is None:
            model = load_pretrained(run, str(checkpoint)).model
            encoder, left_out = model.encoder, None
            head = masked_image_of(_method_tensors(model, recipe), encoder.config)
        else:  # it may be gone, and without it there is no decoder
            encoder, head, left_out = build_swinv2(recipe).eval(), None, FEATURE_DECODER
            load_strictly(encoder, below(read_weights(checkpoint), f"{ENCODER}."), str(checkpoint))
        mean, std = recipe.data.normalisation
        return TrainedModel(
            encoder=encoder,
            mean=mean,
            std=std,
            channels=trained_channels(read_values(checkpoint / RECIPE_FILE)),
            provenance=provenance_of(checkpoint, recipe),
            masked_image=head,
            left_out=left_out,
            shards=shards,
            image_channels=named,
            origin=str(checkpoint),
        )

    def _count_flops(self) -> int:
        """Return the FLOPs of encoder and decoder; see `simmim.engine.monitor.observers`."""
        encoder, target = self.encoder, self.model.target
        stride = encoder.strides[-1]
        decoded: int = math.prod(-(-side // stride) for side in encoder.image_size)
        if self.recipe.loss.area == "masked" and self.recipe.mask.cell >= stride:
            decoded = math.ceil(decoded * self.recipe.mask.ratio)
        per_feature: int = self.model.decoder.flops_per_feature
        of_target: int = target.flops // (1 + BACKWARD)  # training counts a backward pass on top
        return encoder_flops(encoder) + decoded * per_feature + of_target

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; see `simmim.engine.stage.TrainingStage`."""
        recipe = self.recipe
        return training_batches(
            self.training_shards,
            self.order,
            TrainTransform(
                data=recipe.data,
                seed=recipe.training.seed,
                channels=recipe.encoder.in_channels,
                mask=self.draw_mask,
            ),
            recipe.data,
            recipe.training,
            rank=rank,
            world=world,
            start=start,
            end=end,
            bad_samples=self.bad_samples,
        )

    def normalisers(self, batch: Batch) -> Tensor | None:
        """Return None: every mask hides equally many pixels, so the loss is a mean over images."""
        del batch
        return None

    def held_out_batches(
        self,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> BatchStream:
        """Return batches of this rank's part of the held-out images, with fixed masks.

        Args:
            batch_size: images over all ranks.
            rank: number of this process.
            world: number of processes.
            workers: data worker processes.
        """
        return evaluation_batches(
            self.validation_shards,
            self._whole_images(),
            batch_size=batch_size,
            rank=rank,
            world=world,
            workers=workers,
            bad_samples=self.bad_samples,
        )

    def _whole_images(self) -> EvalTransform:
        """Return the transform of held-out images: centre crop, and the same mask every time."""
        data = self.recipe.data
        return EvalTransform(
            size=data.size,
            channels=self.recipe.encoder.in_channels,
            mask=self.draw_mask,
            data=data,
        )

    def baselines(self) -> dict[str, float]:
        """Return the loss of predicting the mean target, on some of the held-out images."""
        total = count = 0.0
        for batch in self.held_out_batches(batch_size=64):
            total += self._mean_color_loss(batch) * len(batch)
            count += len(batch)
            if count >= BASELINE_IMAGES:
                break
        return {self.model.target.baseline: total / count} if count else {}

    def _mean_color_loss(self, batch: Batch) -> float:
        batch = batch.to(self.module.normalise.mean.device)
        assert batch.masks is not None
        images = self.module.normalise(batch.images)
        return float(self.model.mean_color_loss(images, batch.masks))

    @property
    def validates(self) -> bool:
        """Whether there is validation data."""
        return self.validation_shards.samples > 0

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the loss on held-out images, and the loss of predicting the mean target."""
        sums = torch.zeros(3, dtype=torch.float64)
        training = self.recipe.training
        for batch in self.held_out_batches(
            batch_size=max(1, training.batch_size // training.accumulation),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.recipe.data.workers,
        ):
            loss = self.module(batch.to(accelerator.device))
            sums += torch.tensor([loss.item(), self._mean_color_loss(batch), 1]) * len(batch)
        total = accelerator.reduce(sums.to(accelerator.device, torch.float32), "sum").cpu()
        if not total[2]:
            return {}
        return {
            "validation_loss": float(total[0] / total[2]),
            self.model.target.baseline: float(total[1] / total[2]),
        }

    def fresh(self) -> "PretrainStage":
        """Return a stage of the same recipe, with initial weights on the CPU."""
        return PretrainStage(self.recipe, self.build_encoder)

    @property
    def watch(self) -> Watch:
        """Validation, the online probe, reconstructions of pixels, and the loss of their mean.

        No metric selects the best checkpoint: a lower loss does not mean a better encoder.
        """
        training, online_probe = self.recipe.training, self.online_probe
        observers = []
        if self.validates:
            observers.append(validation(self.validate, every=training.validate_every))
        if online_probe is not None:
            run_probe = partial(online_probe.run, self.module.features)
            observers.append(probe(run_probe, every=online_probe.settings.every))
        if self.model.target.is_pixels:
            observers.append(pictures(self.visualize, every=training.look_every))
        return Watch(
            observers=tuple(observers),
            flops_per_sample=self.flops_per_sample,
            baselines=self.baselines,
        )

    @torch.no_grad()
    def visualize(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw reconstructions of held-out images, or of training images if there are none.

        They are spread over the set, and are the same with the same masks during the training.
        """
        held_out = self.validation_shards.samples > 0
        batches = picture_batches(
            self.validation_shards if held_out else self.training_shards,
            self._whole_images(),
            count=PANEL_IMAGES,
            batch_size=PANEL_IMAGES,
            bad_samples=self.bad_samples,
        )
        batch = next(iter(batches), None)
        if batch is None:
            return None
        batch = batch.to(accelerator.device)
        assert batch.masks is not None
        images = self.module.normalise(batch.images)
        self.module.eval()
        with accelerator.autocast():
            reconstruction = self.model(images, batch.masks).reconstruction.float()
        reconstruction = self.model.target.to_pixels(reconstruction, images)
        mean, std = self.recipe.data.normalisation
        path = run.reconstructions / f"step-{step:08d}.png"
        reconstruction_panel(
            images,
            batch.masks.to(images.device),
            reconstruction,
            mean=mean,
            std=std,
            path=path,
            stretched=batch.images.dtype != torch.uint8,
            bands=self.recipe.data.drawn_bands,
            caption="original" if held_out else "training image",
        )
        return path

    @property
    def checkpoint_notes(self) -> dict[str, str]:
        """Description of an encoder that is not a SwinV2."""
        return checkpoint_notes(
            self.encoder, *self.recipe.data.normalisation, self.recipe.data.wanted_channels
        )

    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory into the run."""
        save_pretrained(self.model, self.recipe, run.encoder, step=step, samples=samples)


def _method_tensors(model: SimMIM[Any], recipe: PretrainRecipe) -> MethodTensors:
    """Return mask token and decoder of a model."""
    projection = model.decoder.projection
    assert projection.bias is not None
    return MethodTensors(
        mask_token=model.mask_token.detach(),
        weight=projection.weight.detach(),
        bias=projection.bias.detach(),
        target=recipe.loss.target_name,
    )


def save_pretrained(
    model: SimMIM[Any], recipe: PretrainRecipe, path: Path, *, step: int, samples: int
) -> None:
    """Write the encoder of a pretrained model as an encoder directory, with mask token and decoder.

    Of an encoder that is not a SwinV2, it is its weights alone; see `OtherEncoder`.
    """
    mean, std = recipe.data.normalisation
    provenance = Provenance(step=step, samples_seen=samples, recipe_hash=recipe_hash(recipe))
    save_any_encoder(
        model.encoder,
        path,
        mean=mean,
        std=std,
        channels=recipe.data.wanted_channels,
        provenance=provenance,
        method=_method_tensors(model, recipe),
    )


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The model in a checkpoint of a pretraining run."""

    model: SimMIM[Any]
    recipe: PretrainRecipe
    state: TrainingState


def load_pretrained(
    run: RunFolder, checkpoint: str = "auto", encoder: EncoderBuilder = build_swinv2
) -> Pretrained:
    """Rebuild the model of a run from a checkpoint, on the CPU, in evaluation mode.

    Args:
        run: a pretraining run folder.
        checkpoint: path, or `auto` for the last complete one.
        encoder: builds the encoder, as the training did.

    Raises:
        ValueError: the run has no readable recipe or no complete checkpoint.
    """
    path = find_checkpoint(run.checkpoints, checkpoint)
    if path is None:
        raise ValueError(f"{run.checkpoints} has no complete checkpoint; train further first.")
    check_small_files(path)
    recipe = load(PretrainRecipe, path / RECIPE_FILE)
    module = PretrainModule(build_model(recipe, encoder), recipe.data, seed=recipe.training.seed)
    load_model(path, module)
    load_average(path, module)
    return Pretrained(model=module.model.eval(), recipe=recipe, state=load_state(path))
