"""The Python way: what the commands do, as functions.

Like every program that starts worker processes, a script calls them below
`if __name__ == "__main__":`.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from simmim.engine.run import RunFolder
from simmim.recipe import (
    RecipeError,
    load,
    override,
    parse,
    plain_value,
    read_values,
    to_values,
)
from simmim.stop_signals import ProcessExit
from simmim.tasks.all_tasks import task_named
from simmim.tasks.task import Task

if TYPE_CHECKING:
    from simmim.tasks.evaluate import Evaluation
    from simmim.tasks.pretrain.model import EncoderBuilder
    from swinv2 import SwinV2, VideoSwinV2

# ruff: noqa: PLC0415 (what imports torch is imported when it is needed)

RecipeSource: TypeAlias = Any
"""A recipe: the path of a YAML file, a mapping of its values, or a recipe object."""

ARGUMENTS = {
    "--resume auto": 'resume="auto"',
    "--resume PATH": "resume=PATH",
    "--folder": "folder=PATH",
    "--init-from": "init_from=PATH",
    "--allow-recipe-changes": "allow_recipe_changes=True",
    "--ignore-memory": "check_memory=False",
    "--config PRETRAIN.yaml": "config=RECIPE",
    "leave out --best": "leave out best=True",
}
"""Options of the commands, as errors name them, and the arguments of functions in their place."""
FIELD = re.compile(r"--((?:[a-z_]+\.)+[a-z_]+|init)(?![\w-])")
"""A field of the recipe as an option; `overrides` has its name."""


@contextmanager
def _named_as_in_python() -> Iterator[None]:
    """Let errors raised in this context name arguments of functions, not options of commands."""
    try:
        yield
    except ValueError as error:
        if error.args and isinstance(error.args[0], str):
            text = error.args[0]
            for option, argument in ARGUMENTS.items():
                text = text.replace(option, argument)
            error.args = (FIELD.sub(r"\1", text), *error.args[1:])
        raise


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training has written into its folder."""

    folder: Path
    stopped: bool = False
    """Whether a signal stopped the training that returned this: resume it with `resume="auto"`."""

    def __fspath__(self) -> str:
        """Return the folder, so that functions which take the path of a run take the run too."""
        return str(self.folder)

    @property
    def recipe(self) -> Any:
        """The resolved recipe, with all defaults."""
        values = read_values(self._files.recipe)
        return load(
            task_named(values.get("task"), f"recipe {self._files.recipe}").recipe,
            self._files.recipe,
        )

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged figures, one mapping per line of `metrics.jsonl`, by step."""
        return self._files.read_metrics()

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, the oldest first."""
        from simmim.engine.checkpoint.directory import complete_checkpoints

        return list(complete_checkpoints(self._files.checkpoints))

    @property
    def encoder_directory(self) -> Path:
        """The encoder directory, for `swinv2.load_encoder`; there once the training has ended."""
        return self._files.encoder

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self._files.report

    def load_encoder(self) -> "SwinV2 | VideoSwinV2":
        """Load the encoder on the CPU: of the best checkpoint if one is kept, else of the last.

        Raises:
            ValueError: there is no checkpoint yet, or it cannot be read.
        """
        from simmim.export.load_trained import read_source

        return read_source(self.folder).encoder

    @property
    def _files(self) -> RunFolder:
        return RunFolder(path=self.folder)


def pretrain(
    recipe: RecipeSource,
    folder: str | PathLike[str] | None = None,
    *,
    resume: str | PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    init_from: str | PathLike[str] | None = None,
    allow_recipe_changes: bool = False,
    check_memory: bool = True,
    encoder: "EncoderBuilder | None" = None,
) -> Run:
    """Pretrain an encoder on unlabelled images, as `simmim pretrain` does.

    Started by `accelerate launch` or `torchrun`, it trains on all processes.

    Args:
        recipe: the path of a recipe, its values as a mapping, or a recipe object.
        folder: run folder; None is `runs/` and the name of the recipe's file.
        resume: `"auto"` for the last complete checkpoint in the folder, if there is one, or the
            path of a checkpoint; None starts a new training.
        overrides: values by dotted key, such as `{"training.steps": 1000}`.
        init_from: run, checkpoint or encoder directory to start from, unless a checkpoint is
            resumed.
        allow_recipe_changes: resume although the recipe differs from that of the run.
        check_memory: refuse a training that needs more memory than this machine has.
        encoder: builds an encoder of another class from the recipe, with the members of
            `simmim.method.encoder_protocol.ImageEncoder`; None builds the recipe's SwinV2. Its
            weights are exported alone, and its memory is not estimated.

    Raises:
        ValueError: the recipe, the data or the folder cannot be used; names what, where and the
            remedy.
        OSError: a file cannot be read or written.
    """
    return _train(
        "pretrain",
        recipe,
        folder,
        resume=resume,
        overrides=overrides,
        init_from=init_from,
        allow_recipe_changes=allow_recipe_changes,
        check_memory=check_memory and encoder is None,
        stage_options={} if encoder is None else {"encoder": encoder},
    )


def finetune(
    recipe: RecipeSource,
    folder: str | PathLike[str] | None = None,
    *,
    resume: str | PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    init_from: str | PathLike[str] | None = None,
    allow_recipe_changes: bool = False,
    check_memory: bool = True,
) -> Run:
    """Fine-tune an encoder on the task of a recipe, as `simmim finetune` does.

    Arguments and errors are those of `pretrain`. The encoder to start from is `init` of the recipe:
    `overrides={"init": run}`.
    """
    return _train(
        "finetune",
        recipe,
        folder,
        resume=resume,
        overrides=overrides,
        init_from=init_from,
        allow_recipe_changes=allow_recipe_changes,
        check_memory=check_memory,
    )


def evaluate(
    run: str | PathLike[str],
    *,
    data: str | PathLike[str] | None = None,
    best: bool | None = None,
    overrides: Mapping[str, Any] | None = None,
    config: str | PathLike[str] | None = None,
    encoder: "EncoderBuilder | None" = None,
) -> "Evaluation":
    """Validate a checkpoint as its training did, as `simmim evaluate` does.

    Args:
        run: a `Run`, its folder, or a checkpoint; with `config` an encoder directory.
        data: folder or file to validate on; None is the data of the recipe.
        best: take the best checkpoint, or the last; None is the best if one is kept.
        overrides: values of the recipe by dotted key.
        config: recipe of a pretraining, by which the reconstruction loss of an encoder directory
            with mask token and decoder is measured; not with `best`.
        encoder: builds the encoder of a pretraining that was given one; see `pretrain`.

    Returns:
        The figures over all processes, with the checkpoint and step that they are of.

    Raises:
        ValueError: there is no checkpoint, no validation data, or nothing to measure in it.
    """
    from simmim.tasks.evaluate import evaluate as evaluate_checkpoint
    from simmim.tasks.evaluate import evaluate_encoder

    source = Path(run)
    images = None if data is None else str(data)
    with _named_as_in_python():
        if config is not None:
            return evaluate_encoder(source, Path(config), _arguments(overrides), data=images)
        options = {} if encoder is None else {"encoder": encoder}
        return evaluate_checkpoint(
            source, _arguments(overrides), best=best, data=images, stage_options=options
        )


def load_run(folder: str | PathLike[str]) -> Run:
    """Return the run in a folder.

    Raises:
        ValueError: the folder has no recipe.
    """
    files = RunFolder(path=Path(folder))
    if not files.recipe.is_file():
        raise ValueError(
            f"{folder} is not a run folder, which has a recipe.yaml: give the folder of a training."
        )
    return Run(folder=files.path)


def train_task(
    task: Task,
    recipe: Any,
    folder: Path,
    *,
    resume: str | None = None,
    init_from: Path | None = None,
    allow_recipe_changes: bool = False,
    check_memory: bool = True,
    process_exit: ProcessExit = "no",
    stage_options: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Train a recipe on its task, which `simmim pretrain` and `simmim finetune` do too.

    Args:
        task: the task.
        recipe: a recipe object of the task.
        folder: run folder.
        resume: see `pretrain`, like what follows.
        init_from: see there.
        allow_recipe_changes: see there.
        check_memory: see there.
        process_exit: whether the process exits afterwards.
        stage_options: further arguments of the task's stage.
    """
    from simmim.doctor.fits import check_fits
    from simmim.tasks.train import train_recipe

    stage: Callable[..., Any] = task.stage
    result = train_recipe(
        partial(stage, **stage_options),
        recipe,
        run=RunFolder(path=folder),
        resume=resume,
        allow_changes=allow_recipe_changes,
        init_from=init_from,
        check_memory=check_fits if check_memory else None,
        process_exit=process_exit,
    )
    return Run(folder=folder, stopped=result.stopped)


@_named_as_in_python()
def _train(
    command: Literal["pretrain", "finetune"],
    recipe: RecipeSource,
    folder: str | PathLike[str] | None,
    *,
    resume: str | PathLike[str] | None,
    overrides: Mapping[str, Any] | None,
    init_from: str | PathLike[str] | None,
    **options: Any,
) -> Run:
    values = _values(recipe, overrides)
    named = isinstance(recipe, str | PathLike)
    origin = f"recipe {os.fspath(recipe)}" if named else "the recipe"
    if folder is None and not named:
        raise ValueError("a recipe without a file has no name: give the run folder as `folder`.")
    task = task_named(values.get("task"), origin)
    if task.fine_tunes != (command == "finetune"):
        other = "finetune" if task.fine_tunes else "pretrain"
        raise RecipeError(f"{origin} has task {task.name}: call simmim.{other} for it.")
    return train_task(
        task,
        parse(task.recipe, values, origin),
        default_folder(Path(recipe)) if folder is None else Path(folder),
        resume=None if resume is None else os.fspath(resume),
        init_from=None if init_from is None else Path(init_from),
        **options,
    )


def default_folder(recipe: Path) -> Path:
    """Return the run folder of a recipe's file if none is given: `runs/` and its name."""
    return Path("runs") / recipe.stem


def _values(recipe: RecipeSource, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the values of a recipe with overrides.

    Raises:
        RecipeError: the file cannot be read, or `recipe` is nothing that names a recipe.
    """
    if isinstance(recipe, str | PathLike):
        values = read_values(Path(recipe))
    elif isinstance(recipe, Mapping):
        values = copy.deepcopy(dict(recipe))
    elif is_dataclass(recipe) and not isinstance(recipe, type):
        values = to_values(recipe)
    else:
        raise RecipeError(
            f"recipe is {type(recipe).__name__}: give the path of a YAML file, a mapping of its "
            "values, or a recipe object."
        )
    return override(values, _checked(overrides))


def _checked(overrides: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return overrides; none if they are None.

    Raises:
        RecipeError: they are not a mapping.
    """
    if overrides is None or isinstance(overrides, Mapping):
        return overrides or {}
    raise RecipeError(
        f"overrides is a {type(overrides).__name__}: give a mapping by dotted key, such as "
        '{"training.steps": 1000}.'
    )


def _arguments(overrides: Mapping[str, Any] | None) -> list[str]:
    """Return overrides as the command line has them."""
    given = _checked(overrides).items()
    return [
        text
        for key, value in given
        for text in (f"--{key}", json.dumps(value, default=plain_value))
    ]
