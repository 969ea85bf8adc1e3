"""Loading trained weights: encoder and head of a run, a checkpoint or an encoder directory."""

from dataclasses import dataclass
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
from simmim.tasks.other_encoder import OTHER_FILE, exported_step, refuse_other_encoder
from simmim.tasks.trained import TrainedModel, read_directory


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where trained weights are."""

    directory: Path
    """The encoder directory, or that of the run, which may not exist yet."""
    run: RunFolder | None = None
    """The run; None for an encoder directory."""
    checkpoint: Path | None = None
    """The checkpoint; None for the weights in the directory."""

    @property
    def weights(self) -> Path:
        """The folder that has the weights."""
        return self.checkpoint or self.directory


def find_source(source: Path, *, best: bool | None = None) -> Source:
    """Find the weights of a run folder, a checkpoint or an encoder directory.

    Args:
        source: a run folder (a complete checkpoint or, without one, its exported encoder), a
            checkpoint, or an encoder directory.
        best: take the best checkpoint of a run, or the last; None is the best if it has one.

    Raises:
        ValueError: `source` is none of them, or has no such checkpoint.
    """
    if (source / COMPLETE).is_file():
        checkpoint = chosen_checkpoint(source)
        run = RunFolder(path=checkpoint.parent.parent)
        return Source(directory=run.encoder, run=run, checkpoint=checkpoint)
    run = RunFolder(path=source)
    if run.recipe.is_file():
        exported = _is_only_in_export(run, best)
        chosen = None if exported else chosen_checkpoint(source, best=best)
        return Source(directory=run.encoder, run=run, checkpoint=chosen)
    if best is not None:
        name = "best" if best else "last"
        raise ValueError(f"{source} is not a run folder, so it has no {name} checkpoint.")
    if any((source / name).is_file() for name in ("config.json", OTHER_FILE)):
        return Source(directory=source)
    state = "does not exist" if not source.exists() else "has no trained weights"
    raise ValueError(
        f"{source} {state}: give a run folder (with recipe.yaml and checkpoints/) or an encoder "
        "directory (with config.json and model.safetensors)."
    )


def read_source(source: Path, *, best: bool | None = None) -> TrainedModel:
    """Load the encoder at a source, on the CPU; see `find_source`.

    Raises:
        ValueError: `source` has no weights, cannot be read, or has an encoder that is not a SwinV2.
    """
    return read_model_at(find_source(source, best=best))


def read_model_at(found: Source) -> TrainedModel:
    """Load the SwinV2 at a source, on the CPU.

    Raises:
        ValueError: it cannot be read, or is not a SwinV2.
    """
    for folder in (found.directory, found.checkpoint):
        if folder is not None:
            refuse_other_encoder(folder, "load_encoder needs")
    if found.run is None:
        return _with_head(read_directory(found.directory), found.directory)
    return _read_run(found.run, found.checkpoint)


def _is_only_in_export(run: RunFolder, best: bool | None) -> bool:
    """Return whether only the run's own export still has the weights: their checkpoint is gone."""
    named = read_best(run.path)
    if named is None or best is False:
        return not (best or named) and not complete_checkpoints(run.checkpoints)
    if kept_best(run.path) is not None or not run.encoder.is_dir():
        return False
    return exported_step(run.encoder) == named.step


def _read_run(run: RunFolder, checkpoint: Path | None) -> TrainedModel:
    file = run.recipe if checkpoint is None else checkpoint / RECIPE_FILE
    name = read_values(file).get("task")
    if checkpoint is None and not run.encoder.is_dir():
        raise ValueError(
            f"{run.path} has no complete checkpoint and no encoder yet: train further first."
        )
    if name not in [task.name for task in TASKS]:
        raise RecipeError(f"{file} has task {name!r}, which has no encoder to export.")
    task = task_named(name, f"recipe {file}")
    found: TrainedModel = task.stage.read_trained(run, partial(load, task.recipe, file), checkpoint)
    return found


def _with_head(found: TrainedModel, folder: Path) -> TrainedModel:
    """Add the head that a native export has in a folder."""
    for task in TASKS:
        if task.head is not None and (folder / task.head).is_dir():
            whole: TrainedModel = task.stage.with_head(found, folder / task.head)
            return whole
    return found
