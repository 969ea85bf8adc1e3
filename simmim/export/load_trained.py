"""Loading trained weights: encoder and head of a run, a checkpoint or an encoder directory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmim.data.datasets.opening import first_folder
from simmim.data.settings import DataSettings
from simmim.engine.checkpoint.choosing import chosen_checkpoint
from simmim.engine.checkpoint.directory import (
    COMPLETE,
    RECIPE_FILE,
    complete_checkpoints,
    kept_best,
    load_state,
    read_best,
)
from simmim.engine.checkpoint.ema import read_average
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, load, read_values, recipe_hash
from simmim.tasks.all_tasks import FINE_TUNING, task_named
from simmim.tasks.classification.classifier import read_head, read_preparation
from simmim.tasks.fine_tuning import FineTuningStage
from simmim.tasks.other_encoder import refuse_other_encoder
from simmim.tasks.pretrain.stage import load_pretrained
from simmim.tasks.recipe import HEAD_FOLDER, FineTuningRecipe
from simmim.tasks.segmentation.dense_stage import DenseStage, load_dense
from swinv2 import SwinV2, VideoSwinV2, load_video_encoder, read_video_config
from swinv2.bridges.checkpoints import ClassifierHead, MaskedImageHead
from swinv2.bridges.preprocessing import Preparation
from swinv2.bridges.transformers_backbone import encoder_from_backbone
from swinv2.config_file import (
    Provenance,
    is_video_encoder,
    read_encoder_config,
    read_provenance,
)
from swinv2.weights import load_encoder, load_strictly

MODEL_PREFIX = "model."
"""Prefix of encoder and head in the names of a fine-tuning checkpoint's tensors."""


@dataclass(frozen=True, kw_only=True)
class DenseHead:
    """Encoder and head of segmentation or detection, as one model of transformers."""

    task: str
    """The task, which is also the name of its folder."""
    net: Callable[[], Any]
    """Returns the model, in evaluation mode."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained encoder with its head, normalisation and provenance."""

    encoder: SwinV2 | VideoSwinV2
    mean: tuple[float, ...]
    std: tuple[float, ...]
    provenance: Provenance
    inflated_from: Provenance | None = None
    """Provenance of the image encoder that an encoder of clips was inflated from."""
    head: MaskedImageHead | None = None
    """Mask token and decoder, from a pretraining run."""
    classifier: ClassifierHead | None = None
    """Linear head, from a classification of images or clips."""
    classes: tuple[str, ...] = ()
    """Class names of the classifier; empty if they are no longer known."""
    dense: DenseHead | None = None
    """Model of a segmentation or detection."""
    preparation: Preparation | None = None
    """Preparation of pictures besides mean and std, as validation has it; None if unknown."""
    shards: str | None = None
    """Training data of the run."""
    origin: str
    """Source of the weights, for messages."""


def read_source(source: Path, *, best: bool | None = None) -> TrainedModel:
    """Load the encoder of a run folder, a checkpoint or an encoder directory, on the CPU.

    Args:
        source: a run folder (a complete checkpoint or, without one, its exported encoder), a
            checkpoint, or an encoder directory.
        best: take the best checkpoint of a run, or the last; None is the best if it has one.

    Raises:
        ValueError: `source` is none of them, has no such checkpoint, cannot be read, or has an
            encoder that is not a SwinV2.
    """
    for folder in (source, source / "encoder", source.parent.parent / "encoder"):
        refuse_other_encoder(folder, "all formats of simmim export need")
    if (source / COMPLETE).is_file():
        checkpoint = chosen_checkpoint(source)
        return _read_run(RunFolder(path=checkpoint.parent.parent), checkpoint)
    run = RunFolder(path=source)
    if run.recipe.is_file():
        exported = _is_only_in_export(run, best)
        return _read_run(run, None if exported else chosen_checkpoint(source, best=best))
    if best is not None:
        name = "best" if best else "last"
        raise ValueError(f"{source} is not a run folder, so it has no {name} checkpoint.")
    if (source / "config.json").is_file():
        return _with_head(read_directory(source), source)
    state = "does not exist" if not source.exists() else "has no trained weights"
    raise ValueError(
        f"{source} {state}: give a run folder (with recipe.yaml and checkpoints/) or an encoder "
        "directory (with config.json and model.safetensors)."
    )


def _is_only_in_export(run: RunFolder, best: bool | None) -> bool:
    """Return whether only the run's own export still has the weights: their checkpoint is gone."""
    named = read_best(run.path)
    if named is None or best is False:
        return not (best or named) and not complete_checkpoints(run.checkpoints)
    if kept_best(run.path) is not None or not run.encoder.is_dir():
        return False
    return read_provenance(run.encoder).step == named.step


def read_directory(path: Path) -> TrainedModel:
    """Load an encoder directory, of images or of clips."""
    if is_video_encoder(path):
        clips = read_video_config(path)
        return TrainedModel(
            encoder=load_video_encoder(path),
            mean=clips.mean,
            std=clips.std,
            provenance=clips.provenance,
            inflated_from=clips.inflated_from,
            origin=str(path),
        )
    images = read_encoder_config(path)
    return TrainedModel(
        encoder=load_encoder(path),
        mean=images.mean,
        std=images.std,
        provenance=images.provenance,
        origin=str(path),
    )


def _read_run(run: RunFolder, checkpoint: Path | None) -> TrainedModel:
    recipe = run.recipe if checkpoint is None else checkpoint / RECIPE_FILE
    task = read_values(recipe).get("task")
    if checkpoint is None and not run.encoder.is_dir():
        raise ValueError(
            f"{run.path} has no complete checkpoint and no encoder yet: train further first."
        )
    match task:
        case "pretrain":
            if checkpoint is None:
                return read_directory(run.encoder)
            return _read_pretraining(run, checkpoint)
        case str() if task in FINE_TUNING:
            return _read_fine_tuning(run, recipe, task, checkpoint)
        case other:
            raise RecipeError(f"{recipe} has task {other!r}, which has no encoder to export.")


def _read_pretraining(run: RunFolder, checkpoint: Path) -> TrainedModel:
    pretrained = load_pretrained(run, str(checkpoint))
    model, recipe = pretrained.model, pretrained.recipe
    projection = model.decoder.projection
    assert projection.bias is not None
    mean, std = recipe.data.normalisation
    return TrainedModel(
        encoder=model.encoder,
        mean=mean,
        std=std,
        provenance=_provenance(checkpoint, recipe),
        head=MaskedImageHead(
            mask_token=model.mask_token.detach(),
            weight=projection.weight.detach(),
            bias=projection.bias.detach(),
        ),
        shards=first_folder(recipe.data.shards),
        origin=str(checkpoint),
    )


def _read_fine_tuning(
    run: RunFolder, saved: Path, task: str, checkpoint: Path | None
) -> TrainedModel:
    """Load a fine-tuned model; a finished run does not need the weights that it started from."""
    trained = task_named(task, saved)
    recipe: FineTuningRecipe = load(trained.recipe, saved)
    stage: type[FineTuningStage[Any, Any]] = trained.stage
    data = recipe.data
    shards = first_folder(data.shards) if isinstance(data, DataSettings) else None
    ended = read_directory(run.encoder) if run.encoder.is_dir() else None
    if ended is not None and (
        checkpoint is None or load_state(checkpoint).step == ended.provenance.step
    ):
        headed = _with_head(ended, run.path)
        crop = Preparation(crop_pct=recipe.validation_crop)
        return replace(headed, preparation=headed.preparation or crop, shards=shards)
    assert checkpoint is not None
    untrained = ended or _initial(stage, recipe)
    found = replace(
        untrained,
        provenance=_provenance(checkpoint, recipe),
        preparation=Preparation(crop_pct=recipe.validation_crop),
        shards=shards,
        origin=str(checkpoint),
    )
    tensors = _strip_prefix(read_model(checkpoint) | read_average(checkpoint), MODEL_PREFIX)
    if issubclass(stage, DenseStage):
        return _fill_dense(found, stage, recipe, tensors)
    return _fill_classifier(found, stage, recipe, run, tensors)


def _initial(stage: type[FineTuningStage[Any, Any]], recipe: FineTuningRecipe) -> TrainedModel:
    """Return the initial encoder of a run that has not exported one yet."""
    initial = stage.load_initial(recipe)
    return TrainedModel(
        encoder=initial.encoder,
        mean=initial.mean,
        std=initial.std,
        provenance=Provenance(),
        inflated_from=initial.inflated_from,
        origin=recipe.init,
    )


def _fill_classifier(
    found: TrainedModel,
    stage: type[FineTuningStage[Any, Any]],
    recipe: FineTuningRecipe,
    run: RunFolder,
    tensors: Mapping[str, Tensor],
) -> TrainedModel:
    """Load the weights of a checkpoint into the encoder, and add the head."""
    load_strictly(found.encoder, _strip_prefix(tensors, "encoder."), found.origin)
    head = _strip_prefix(tensors, "head.")
    return replace(
        found,
        encoder=found.encoder.eval(),
        classifier=ClassifierHead(weight=head["weight"], bias=head["bias"]),
        classes=_class_names(stage, recipe, run, len(head["bias"])),
    )


def _fill_dense(
    found: TrainedModel,
    stage: type[DenseStage[Any, Any]],
    recipe: FineTuningRecipe,
    tensors: Mapping[str, Tensor],
) -> TrainedModel:
    """Build the model of segmentation or detection with the weights of a checkpoint."""
    assert isinstance(found.encoder, SwinV2)
    with torch.random.fork_rng(devices=[]):
        model = stage.build_model(recipe, found.encoder, stage.class_names(recipe))
    load_strictly(model, tensors, found.origin)
    return replace(
        found,
        encoder=encoder_from_backbone(model.backbone),
        dense=DenseHead(task=recipe.task, net=model.net.eval),
    )


def _with_head(found: TrainedModel, folder: Path) -> TrainedModel:
    """Add the head that a finished run or a native export has in a folder."""
    if (folder / HEAD_FOLDER).is_dir():
        tensors, classes = read_head(folder / HEAD_FOLDER)
        linear = nn.Linear(found.encoder.num_features, len(classes))
        load_strictly(linear, tensors, str(folder / HEAD_FOLDER))
        classifier = ClassifierHead(weight=linear.weight.detach(), bias=linear.bias.detach())
        preparation = read_preparation(folder / HEAD_FOLDER)
        return replace(found, classifier=classifier, classes=classes, preparation=preparation)
    for task in ("segmentation", "detection"):
        place = folder / task
        if place.is_dir():
            return replace(found, dense=DenseHead(task=task, net=partial(load_dense, place)))
    return found


def _class_names(
    stage: type[FineTuningStage[Any, Any]], recipe: FineTuningRecipe, run: RunFolder, count: int
) -> tuple[str, ...]:
    """Return the class names; empty if the data are gone or have changed."""
    try:
        if (run.path / HEAD_FOLDER).is_dir():
            _, classes = read_head(run.path / HEAD_FOLDER)
        else:
            classes = stage.class_names(recipe)
    except ValueError:
        return ()
    return classes if len(classes) == count else ()


def _strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _provenance(checkpoint: Path, recipe: Any) -> Provenance:
    state = load_state(checkpoint)
    return Provenance(step=state.step, samples_seen=state.cursor, recipe_hash=recipe_hash(recipe))
