"""The command `simmim doctor`: its arguments, and the recipe, which is read without torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from simmim.doctor.checks import Check, print_checks
from simmim.recipe import RecipeError, load, read_values
from simmim.tasks.all_tasks import task_named
from simmim.tasks.recipe import TaskRecipe

SECONDS = 15.0


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `simmim doctor`."""
    command.description = (
        "Check recipe, run folder, data, memory, disk and speeds, take dry steps on every process, "
        "and print what to change. Nothing is written. Launch it the same way as training: with "
        "accelerate launch or torchrun for several processes. --KEY VALUE overrides any field of "
        "the recipe, as in training: --init PATH names the encoder directory or the finished run "
        "that a fine-tuning starts from. Exit code 2 if training would fail."
    )
    command.add_argument("--config", required=True, type=Path, help="the recipe, a YAML file")
    command.add_argument("--folder", help="run folder (default: runs/ and the recipe's name)")
    command.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="the value of --resume that training will be started with",
    )
    command.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="seconds of reading data, and of taking dry steps (default: %(default)s)",
    )
    command.set_defaults(handler=run_doctor, takes_overrides=True)


def run_doctor(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim doctor`."""
    try:
        recipe = read_recipe(arguments.config, overrides)
    except RecipeError as error:
        return print_checks([Check(name="recipe", verdict="problem", found=str(error))])
    from simmim.doctor.examine import examine_training  # noqa: PLC0415 (imports torch)

    first = Check(name="recipe", verdict="ok", found=describe_recipe(recipe))
    return examine_training(
        recipe,
        arguments.folder or str(Path("runs") / arguments.config.stem),
        first,
        resume=arguments.resume,
        seconds=arguments.seconds,
    )


def read_recipe(config: Path, overrides: Sequence[str]) -> TaskRecipe:
    """Read the recipe of any training task.

    Raises:
        RecipeError: it cannot be read or has mistakes.
    """
    task = task_named(read_values(config, overrides).get("task"), config)
    recipe: TaskRecipe = load(task.recipe, config, overrides)
    return recipe


def describe_recipe(recipe: TaskRecipe) -> str:
    """Summarise a recipe in one line."""
    init = recipe.init_directory
    model = recipe.encoder.variant if init is None else f"the encoder of {init}"
    return (
        f"{recipe.task}, {model} at {recipe.input_text}, "
        f"{recipe.training.batch_size:,} {recipe.SAMPLES} per step"
    )
