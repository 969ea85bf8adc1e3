"""The command `simmim doctor`: what it takes, and the recipe, which is read without torch."""

# ruff: noqa: PLC0415 (help needs no recipe, and a recipe no torch)
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from data_prep.bounds import Amount
from data_prep.format.command_line import FLAT
from simmim.fields import Overrides, RecipeOptions

if TYPE_CHECKING:
    from simmim.tasks.recipe import TaskRecipe

SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(RecipeOptions):
    """Options of `simmim doctor`."""

    folder: str | None = None
    """Run folder. Default: runs/ and the recipe's name."""
    resume: str | None = None
    """The value of --resume that training will be started with: auto, or a checkpoint."""
    seconds: Amount = SECONDS
    """Seconds of reading data, and of taking dry steps."""


def doctor(*overrides: Overrides, options: Annotated[DoctorOptions, FLAT] = DoctorOptions()) -> int:
    """Check a training setup before it starts, and print what to change.

    Recipe, run folder, data, memory, disk and speeds are checked, and dry steps are taken on every
    process. Nothing is written. Launch it the same way as training: with accelerate launch or
    torchrun for several processes. --init PATH names the encoder directory or the finished run that
    a fine-tuning starts from. The exit code is 2 if training would fail.
    """
    from simmim.doctor.checks import Check, print_checks
    from simmim.recipe import RecipeError

    config = options.recipe_file(overrides)
    try:
        recipe = read_recipe(config, overrides)
    except RecipeError as error:
        return print_checks([Check(name="recipe", verdict="problem", found=str(error))])
    from simmim.doctor.examine import examine_training

    first = Check(name="recipe", verdict="ok", found=describe_recipe(recipe))
    return examine_training(
        recipe,
        options.folder or str(Path("runs") / config.stem),
        first,
        resume=options.resume,
        seconds=options.seconds,
    )


def read_recipe(config: Path, overrides: Sequence[str]) -> "TaskRecipe":
    """Read the recipe of any training task.

    Raises:
        RecipeError: it cannot be read or has mistakes.
    """
    from simmim.recipe import load, read_values
    from simmim.tasks.all_tasks import task_named

    task = task_named(read_values(config, overrides).get("task"), f"recipe {config}")
    recipe: TaskRecipe = load(task.recipe, config, overrides, DoctorOptions.names())
    return recipe


def describe_recipe(recipe: "TaskRecipe") -> str:
    """Summarise a recipe in one line."""
    init = recipe.init_directory
    model = recipe.encoder.architecture if init is None else f"the encoder of {init}"
    return (
        f"{recipe.task}, {model} at {recipe.input_text}, "
        f"{recipe.training.batch_size:,} {recipe.SAMPLES} per step"
    )
