"""All tasks. A new one is a folder with a recipe and a stage, and a line here."""

from typing import Any

from simmim.recipe import RecipeError
from simmim.tasks.classification.task import TASK as CLASSIFICATION
from simmim.tasks.detection.task import TASK as DETECTION
from simmim.tasks.pretrain.task import TASK as PRETRAIN
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
        source: the recipe, for the message.

    Raises:
        RecipeError: there is no such task.
    """
    for task in TASKS:
        if task.name == name:
            return task
    names = ", ".join(task.name for task in TASKS)
    raise RecipeError(f"recipe {source}: task is {name!r}; choose one of {names}.")


def fine_tuning_named(name: object, source: object) -> Task:
    """Return the task of a recipe for `simmim finetune`.

    Raises:
        RecipeError: `simmim finetune` does not train this task.
    """
    if name not in fine_tuning_tasks():
        raise RecipeError(
            f"recipe {source}: task is {name!r}; simmim finetune trains "
            f"{', '.join(fine_tuning_tasks())}, simmim pretrain and simmim probe have their own "
            "recipes."
        )
    return task_named(name, source)


def task_of_run(values: dict[str, Any]) -> Task | None:
    """Return the task of a run, given the values of its recipe; None if it is not known."""
    return next((task for task in TASKS if task.name == values.get("task")), None)
