"""Loading trained weights: encoder and head of a run, a checkpoint or an encoder directory."""

from functools import partial
from pathlib import Path

from simmim.engine.checkpoint.choosing import chosen_checkpoint
from simmim.engine.checkpoint.directory import (
    COMPLETE,
    RECIPE_FILE,
    complete_checkpoints,
    kept_best,
    read_best,
)
from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, load, read_values
from simmim.tasks.all_tasks import TASKS, task_named
from simmim.tasks.other_encoder import refuse_other_encoder
from simmim.tasks.trained import TrainedModel, read_directory
from swinv2.config_file import read_provenance


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


def _read_run(run: RunFolder, checkpoint: Path | None) -> TrainedModel:
    file = run.recipe if checkpoint is None else checkpoint / RECIPE_FILE
    name = read_values(file).get("task")
    if checkpoint is None and not run.encoder.is_dir():
        raise ValueError(
            f"{run.path} has no complete checkpoint and no encoder yet: train further first."
        )
    if name not in [task.name for task in TASKS]:
        raise RecipeError(f"{file} has task {name!r}, which has no encoder to export.")
    task = task_named(name, file)
    found: TrainedModel = task.stage.read_trained(run, partial(load, task.recipe, file), checkpoint)
    return found


def _with_head(found: TrainedModel, folder: Path) -> TrainedModel:
    """Add the head that a native export has in a folder."""
    for task in TASKS:
        if task.head is not None and (folder / task.head).is_dir():
            whole: TrainedModel = task.stage.with_head(found, folder / task.head)
            return whole
    return found
