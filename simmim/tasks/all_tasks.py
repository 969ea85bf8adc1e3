"""All tasks. A new one is a folder with a recipe and a stage, and a line here."""

from collections.abc import Sequence
from typing import Any

from simmim.recipe import RecipeError
from simmim.tasks.classification.task import TASK as CLASSIFICATION
from simmim.tasks.detection.task import TASK as DETECTION
from simmim.tasks.pretrain.task import TASK as PRETRAIN
from simmim.tasks.probe.recipe import ProbeRecipe
from simmim.tasks.segmentation.task import TASK as SEGMENTATION
from simmim.tasks.task import Task
from simmim.tasks.video.task import TASK as VIDEO

TASKS: list[Task] = [
    PRETRAIN,
    CLASSIFICATION,
    SEGMENTATION,
    DETECTION,
    VIDEO,
]


def fine_tuning_tasks() -> list[str]:
    """Return the names of the tasks of `simmim finetune`."""
    return [task.name for task in TASKS if task.fine_tunes]


def head_folders() -> list[str]:
    """Return the names of the folders in a run or a native export that hold a head."""
    return list(dict.fromkeys(task.head for task in TASKS if task.head is not None))


def task_named(name: object, source: object) -> Task:
    """Return the task of a recipe's `task` field.

    Args:
        name: value of the field.
        source: the recipe, for the message: `recipe PATH`.

    Raises:
        RecipeError: there is no such task.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise unknown_task(name, source, [task.name for task in TASKS])


def unknown_task(name: object, source: object, known: Sequence[str]) -> RecipeError:
    """Return the error of a recipe whose `task` is missing, or none of those known."""
    found = "is missing" if name is None else f"is {name!r}"
    return RecipeError(f"{source}: task {found}; choose one of {', '.join(known)}.")


def recipe_type(task: str, source: object) -> type[Any]:
    """Return the class of the recipes of a task, `probe` included.

    Raises:
        RecipeError: there is no such task.
    """
    return ProbeRecipe if task == "probe" else task_named(task, f"recipe {source}").recipe


def command_of(task: object) -> str | None:
    """Return the command for recipes of a task, without `simmim`; None if there is none."""
    if task == "probe":
        return "probe"
    known = next((one for one in TASKS if one.name == task), None)
    return None if known is None else "finetune" if known.fine_tunes else known.name


def check_command(command: str, task: object, source: object) -> None:
    """Refuse a recipe that is for another command; one whose task is unknown passes.

    Args:
        command: name of the command, without `simmim`.
        task: value of the recipe's `task` field.
        source: the recipe, for the message.

    Raises:
        RecipeError: the recipe is for another command, which is named.
    """
    right = command_of(task)
    if right not in (None, command):
        raise RecipeError(
            f"recipe {source} has task {task}, which is for another command: "
            f"simmim {right} --config {source}"
        )


def fine_tuning_named(name: object, source: object) -> Task:
    """Return the task of a recipe for `simmim finetune`.

    Raises:
        RecipeError: `simmim finetune` does not train this task.
    """
    check_command("finetune", name, source)
    if name not in fine_tuning_tasks():
        raise unknown_task(name, f"recipe {source}", fine_tuning_tasks())
    return task_named(name, source)


def task_of_run(values: dict[str, Any]) -> Task | None:
    """Return the task of a run, given the values of its recipe; None if it is not known."""
    return next((task for task in TASKS if task.name == values.get("task")), None)
