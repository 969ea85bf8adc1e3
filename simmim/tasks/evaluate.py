"""Evaluation of a run's checkpoint by its task's validation, on its data or other data."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from data_prep.format.text import count_noun
from simmim.disk import append_line, why_not_written
from simmim.engine.checkpoint.choosing import chosen_checkpoint
from simmim.engine.checkpoint.directory import RECIPE_FILE, load_state
from simmim.engine.checkpoint.ema import load_average
from simmim.engine.checkpoint.resume import load_initial, load_model
from simmim.engine.devices import build_accelerator, own_process_state
from simmim.engine.distributed.launcher import (
    end_processes,
    end_with_launcher,
    start_processes,
)
from simmim.engine.run import RunFolder
from simmim.environment import print_on_main
from simmim.recipe import differences, load, read_values, to_values
from simmim.tasks.all_tasks import task_named
from simmim.tasks.architecture import overridden, settings_of
from simmim.tasks.input_check import check_input, input_of
from simmim.tasks.other_encoder import other_class
from simmim.tasks.pretrained import find_weights
from swinv2.config_file import METHOD_FILE, EncoderDescription, read_encoder_config
from swinv2.method_file import read_method

EVALUATIONS = "evaluations.jsonl"
"""File in the run with one line per evaluation."""

OF_TRAINING = ("training", "init", "like", "init_head", "mixing", "probe")
"""Recipe keys and sections that only training uses, except for EVALUATED."""

EVALUATED = (
    "training.precision",
    "training.batch_size",
    "training.accumulation",
    "training.rank_timeout",
    "training.seed",
)
"""Keys of `training` that validation uses, or that have to fit those it does."""

IMAGES = {
    "data.shards",
    "data.validation",
    "data.folder",
    "data.validation_folder",
    "data.images",
    "data.validation_images",
    "data.validation_annotations",
}
"""Recipe keys that name the images."""

OF_ENCODER = ("encoder", "data.mean", "data.std")
"""Recipe keys and sections that an encoder directory decides on."""

SIZES = ("encoder", "data.image_size")
"""Recipe keys and sections that change the encoder's sizes."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of an evaluation."""

    checkpoint: Path
    """The checkpoint, or an encoder directory."""
    step: int | None
    """Step of its training; None if it is not known."""
    averaged: bool
    """Whether the weights are a running average (EMA)."""
    figures: dict[str, float]
    data: str = ""
    """What was measured: how many samples, and where they are."""

    @property
    def text(self) -> str:
        """The result as text, one line per metric."""
        known = [] if self.step is None else [f"step {self.step}"]
        known += ["averaged weights"] if self.averaged else []
        lines = [f"{self.checkpoint} ({', '.join(known)})" if known else str(self.checkpoint)]
        if self.data:
            lines.append(f"  on {self.data}")
        return "\n".join(lines + [f"  {name} {value:.4f}" for name, value in self.figures.items()])


@own_process_state()
def evaluate(
    source: Path,
    overrides: Sequence[str] = (),
    *,
    best: bool | None = None,
    data: str | None = None,
    stage_options: Mapping[str, Any] = MappingProxyType({}),
) -> Evaluation:
    """Validate a checkpoint as its training did, and add a line to the run's evaluations.

    Args:
        source: a run folder, or a checkpoint.
        overrides: `--key value` for its recipe: `--data.validation SHARDS` for other images; sizes
            too, once the run has finished.
        best: take the best checkpoint of a run, or the last; None is the best if it has one.
        data: validate on this folder or file, named as the task's recipe names it.
        stage_options: further arguments of the task's stage.

    Returns:
        The metrics over all processes.

    Raises:
        ValueError: there is no checkpoint, no validation data, or nothing to measure in it.
    """
    end_with_launcher()
    if (source / METHOD_FILE).is_file():
        raise ValueError(
            f"{source} is an encoder directory with mask token and decoder: --config PRETRAIN.yaml "
            "measures its reconstruction loss."
        )
    checkpoint = chosen_checkpoint(source, best=best)
    run = RunFolder(path=checkpoint.parent.parent)
    file = checkpoint / RECIPE_FILE
    task = task_named(read_values(file).get("task"), f"recipe {file}")
    if data is not None:
        overrides = [*overrides, *task.recipe.validating_on(data, overrides)]
    recipe, stage_type = _recipe(checkpoint, run, overrides), task.stage
    recipe = _as_asked(recipe, overrides)
    stage = stage_type(recipe, **stage_options)
    check_overrides(file, overrides, recipe, stage.recipe)
    check_class(checkpoint, stage.encoder)
    check_validation_input(stage, checkpoint)
    start_processes()
    line = overridden(recipe, stage.recipe)
    training = recipe.training
    accelerator = build_accelerator(training.precision, training.rank_timeout)
    if accelerator.is_main_process and line is not None:
        sys.stderr.write(f"{line}\n")
    load_model(checkpoint, stage.module)
    averaged = load_average(checkpoint, stage.module)
    stage.module.to(accelerator.device).eval()
    with torch.no_grad():
        figures = stage.validate(accelerator)
    if not stage.validates:
        raise ValueError(
            f"{checkpoint} was trained without validation data: give some with {recipe.VALIDATION}."
        )
    metric = stage.watch.best_metric
    if not figures or metric not in {None, *figures}:
        raise ValueError(
            f"the validation data has nothing to measure {metric or 'the loss'} by: all its "
            f"samples are damaged or without labels. Give other data with {recipe.VALIDATION}."
        )
    found = Evaluation(
        checkpoint=checkpoint,
        step=load_state(checkpoint).step,
        averaged=averaged,
        figures=figures,
        data=_describe_data(stage),
    )
    if accelerator.is_main_process:
        sys.stdout.write(found.text + "\n")
        _note(run, found, overrides)
    end_processes(accelerator)
    return found


@own_process_state()
def evaluate_encoder(
    source: Path, config: Path, overrides: Sequence[str] = (), *, data: str | None = None
) -> Evaluation:
    """Measure the reconstruction loss of an encoder directory that has mask token and decoder.

    Mask, loss and images are those of a recipe; architecture, mean and std the encoder's. So a
    published pretraining is checked before it is continued.

    Args:
        source: an encoder directory, or a run that has finished.
        config: recipe of a pretraining.
        overrides: `--key value` for the recipe.
        data: shards or a folder of images; None takes the held-out images of the recipe.

    Returns:
        The loss over all processes.

    Raises:
        ValueError: the recipe is of another task, the directory has no mask token and decoder of
            its target, or there are no images.
    """
    end_with_launcher()
    task = task_named(read_values(config).get("task"), f"recipe {config}")
    if task.name != "pretrain":
        raise ValueError(
            f"{config} has task {task.name}: --config gives the reconstruction loss of an encoder "
            "by the recipe of a pretraining. Evaluate a trained run without it."
        )
    if data is not None:
        overrides = [*overrides, "--data.shards", data, "--data.validation", data]
    directory = find_weights(str(source)).encoder
    given: Any = load(task.recipe, config, overrides)
    refuse_unused(differences(read_values(config), read_values(config, overrides)))
    recipe = of_encoder(given, read_encoder_config(directory))
    stage = task.stage(recipe)
    warnings = _check_method(directory, stage)
    check_validation_input(stage, directory)
    start_processes()
    training = recipe.training
    accelerator = build_accelerator(training.precision, training.rank_timeout)
    if accelerator.is_main_process:
        changed = differences(to_values(given), to_values(recipe))
        listed = [f"{key} {text}" for key, text in changed.items() if _within(key, OF_ENCODER)]
        if listed:
            sys.stderr.write(f"the encoder overrides the recipe: {', '.join(listed)}\n")
        sys.stderr.writelines(f"WARNING: {text}.\n" for text in warnings)
    load_initial(directory, stage.module)
    stage.module.to(accelerator.device).eval()
    with torch.no_grad():
        figures = stage.validate(accelerator)
    if not figures:
        raise ValueError(
            f"{config} holds out no images: name some with --data FOLDER, or data.validation."
        )
    found = Evaluation(
        checkpoint=directory,
        step=read_encoder_config(directory).provenance.step,
        averaged=False,
        figures=figures,
        data=_describe_data(stage),
    )
    if accelerator.is_main_process:
        sys.stdout.write(found.text + "\n")
    end_processes(accelerator)
    return found


def of_encoder(recipe: Any, start: EncoderDescription) -> Any:
    """Return the recipe of a pretraining for the evaluation of an encoder, which trains nothing."""
    data = recipe.data
    changed = replace(
        recipe,
        encoder=settings_of(recipe.encoder, start.config),
        data=replace(
            data,
            mean=start.mean,
            std=start.std,
            channels=start.channels or data.channels,
            shards=data.validation or data.shards,
            slots=None,
        ),
        probe=None,
    )
    return changed.starting_from(start)


def _check_method(directory: Path, stage: Any) -> list[str]:
    """Check that mask token and decoder of a directory are for a stage, and return warnings.

    Raises:
        ValueError: there are none, or they are for another target.
    """
    found = read_method(directory)
    if found is None:
        raise ValueError(
            f"{directory} has no mask token and decoder ({METHOD_FILE}), without which nothing is "
            "reconstructed: give the encoder of a pretraining, or import a SimMIM checkpoint."
        )
    wanted, held = stage.recipe.loss.target_name, found.target
    decoder = stage.model.decoder.projection.weight
    if decoder.shape != found.weight.shape:
        raise ValueError(
            f"the decoder of {directory} predicts {held or 'other values'}, "
            f"{len(found.bias):,} for each feature, and the recipe asks for {wanted}, "
            f"{len(decoder):,}: set loss.target to what it was trained for."
        )
    if held in (None, wanted):
        return []
    return [f"the decoder of {directory} was trained for {held}, and the recipe measures {wanted}"]


def _describe_data(stage: Any) -> str:
    """Return how many samples were held out, and where they are."""
    source = stage.validation_shards
    folders = dict.fromkeys(str(source.folder_of(shard)) for shard in range(len(source.sizes)))
    noun = stage.recipe.SAMPLES.removesuffix("s")
    return f"{count_noun(source.samples, noun)} of {', '.join(folders)}"


def check_class(checkpoint: Path, encoder: Any) -> None:
    """Refuse a checkpoint of an encoder of another class than the one that is built for it.

    Raises:
        ValueError: it is of another class; names both.
    """
    built, trained = type(encoder).__name__, other_class(checkpoint)
    if trained not in (None, built):
        raise ValueError(
            f"the encoder of {checkpoint} is a {trained}, and its recipe alone builds a {built}: "
            f"evaluate it from Python, simmim.evaluate(run, encoder=...) with a function that "
            f"builds the {trained}."
        )


def check_validation_input(stage: Any, checkpoint: Path) -> None:
    """Warn of held-out images of another scale than the weights of a checkpoint were trained on.

    Raises:
        ValueError: the images have other channels.
    """
    if stage.validation_shards is not None:
        wanted = replace(input_of(stage), trained=str(checkpoint), evaluated=True, measured=False)
        for text in check_input(stage.validation_shards, wanted, stage.recipe.data):
            print_on_main(f"WARNING: {text}")


def check_overrides(file: Path, overrides: Sequence[str], given: Any, trained: Any) -> None:
    """Refuse overrides that would change nothing in an evaluation.

    Args:
        file: the recipe of the checkpoint.
        overrides: `--key value` for it.
        given: the recipe with them.
        trained: the recipe as the stage has it, with the architecture of the trained weights.

    Raises:
        ValueError: the encoder decides on a setting, or only training uses it; names each.
    """
    replaced = differences(to_values(given), to_values(trained))
    for key, text in differences(read_values(file), read_values(file, overrides)).items():
        if key in replaced:
            raise ValueError(
                f"--{key} ({text}) has no effect: the trained encoder has {key} of its own. Leave "
                "it out."
            )
        refuse_unused({key: text})


def refuse_unused(changed: Mapping[str, str]) -> None:
    """Raise ValueError if a change of a recipe is one that only training uses; names the key."""
    for key, text in changed.items():
        if _within(key, OF_TRAINING) and not _within(key, EVALUATED):
            raise ValueError(
                f"--{key} ({text}) has no effect: only training uses it. Leave it out."
            )


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _recipe(checkpoint: Path, run: RunFolder, overrides: Sequence[str]) -> Any:
    """Return the recipe of a checkpoint with overrides."""
    file = checkpoint / RECIPE_FILE
    recipe: Any = load(
        task_named(read_values(file).get("task"), f"recipe {file}").recipe, file, overrides
    )
    if "init" not in to_values(recipe):
        return recipe
    if run.encoder.is_dir():
        # It records the windows of pretraining, and what the run started from may be gone.
        return replace(recipe, init=str(run.encoder))
    for key in differences(read_values(file), read_values(file, overrides)):
        if _within(key, SIZES):
            raise ValueError(
                f"--{key} changes the encoder's sizes, and {run.path} has no encoder directory yet "
                "that records the pretraining windows: finish the training first."
            )
    return recipe


def _as_asked(recipe: Any, overrides: Sequence[str]) -> Any:
    """Return a recipe that reorders the channels of other images only if that is asked for.

    The recipe of a run names the channels that were trained on, whoever has asked for them.
    """
    given = {one.partition("=")[0].removeprefix("--") for one in overrides}
    if "data.channels" in given or not given & IMAGES or recipe.init_directory is None:
        return recipe
    return replace(recipe, data=replace(recipe.data, channels=None))


def _note(run: RunFolder, found: Evaluation, overrides: Sequence[str]) -> None:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "checkpoint": found.checkpoint.name,
        "step": found.step,
        "averaged": found.averaged,
        "changes": list(overrides),
        **found.figures,
    }
    path = run.path / EVALUATIONS
    try:
        with path.open("ab", buffering=0) as file:
            append_line(file, json.dumps(line).encode() + b"\n")
    except OSError as error:  # someone else's run may be read-only
        reason = why_not_written(error, run.path)
        sys.stderr.write(f"WARNING: the result was not added to {path}: {reason}.\n")
