"""Evaluation of a run's checkpoint by its task's validation, on its data or other data."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.format.text import count_noun
from simmim.disk import append_line, why_not_written
from simmim.engine.checkpoint.choosing import chosen_checkpoint
from simmim.engine.checkpoint.directory import RECIPE_FILE, load_state
from simmim.engine.checkpoint.ema import load_average
from simmim.engine.checkpoint.resume import load_model
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
from simmim.tasks.architecture import overridden
from simmim.tasks.input_check import check_input, input_of

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

SIZES = ("encoder", "data.image_size")
"""Recipe keys and sections that change the encoder's sizes."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of an evaluation."""

    checkpoint: Path
    step: int
    averaged: bool
    """Whether the weights are a running average (EMA)."""
    figures: dict[str, float]
    data: str = ""
    """What was measured: how many samples, and where they are."""

    @property
    def text(self) -> str:
        """The result as text, one line per metric."""
        average = ", averaged weights" if self.averaged else ""
        lines = [f"{self.checkpoint} (step {self.step}{average})"]
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
) -> Evaluation:
    """Validate a checkpoint as its training did, and add a line to the run's evaluations.

    Args:
        source: a run folder, or a checkpoint.
        overrides: `--key value` for its recipe: `--data.validation SHARDS` for other images; sizes
            too, once the run has finished.
        best: take the best checkpoint of a run, or the last; None is the best if it has one.
        data: validate on this folder or file, named as the task's recipe names it.

    Returns:
        The metrics over all processes.

    Raises:
        ValueError: there is no checkpoint, no validation data, or nothing to measure in it.
    """
    end_with_launcher()
    checkpoint = chosen_checkpoint(source, best=best)
    run = RunFolder(path=checkpoint.parent.parent)
    file = checkpoint / RECIPE_FILE
    task = task_named(read_values(file).get("task"), file)
    if data is not None:
        overrides = [*overrides, *task.recipe.validating_on(data, overrides)]
    recipe, stage_type = _recipe(checkpoint, run, overrides), task.stage
    recipe = _as_asked(recipe, overrides)
    stage = stage_type(recipe)
    check_overrides(file, overrides, recipe, stage.recipe)
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


def _describe_data(stage: Any) -> str:
    """Return how many samples were held out, and where they are."""
    source = stage.validation_shards
    folders = dict.fromkeys(str(source.folder_of(shard)) for shard in range(len(source.sizes)))
    noun = stage.recipe.SAMPLES.removesuffix("s")
    return f"{count_noun(source.samples, noun)} of {', '.join(folders)}"


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
        if _within(key, OF_TRAINING) and not _within(key, EVALUATED):
            raise ValueError(
                f"--{key} ({text}) has no effect: only training uses it. Leave it out."
            )


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _recipe(checkpoint: Path, run: RunFolder, overrides: Sequence[str]) -> Any:
    """Return the recipe of a checkpoint with overrides."""
    file = checkpoint / RECIPE_FILE
    recipe: Any = load(task_named(read_values(file).get("task"), file).recipe, file, overrides)
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
    except OSError as error:  # a run of others may be read-only
        reason = why_not_written(error, run.path)
        sys.stderr.write(f"WARNING: the result was not added to {path}: {reason}.\n")
