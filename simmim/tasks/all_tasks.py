"""All tasks by name: the recipe class of each, and its stage, which is imported when asked for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from simmim.recipe import RecipeError
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.detection.recipe import DetectionRecipe
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.segmentation.recipe import SegmentationRecipe
from simmim.tasks.video.recipe import VideoRecipe

if TYPE_CHECKING:
    from simmim.tasks.fine_tuning import FineTuningStage
    from simmim.tasks.pretrain.stage import PretrainStage

TaskStage: TypeAlias = "PretrainStage | FineTuningStage[Any, Any]"

FINE_TUNING = ("classification", "segmentation", "detection", "video")
"""Tasks of `simmim finetune`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: the class of its recipes, and the stage that trains one."""

    name: str
    recipe: type[Any]

    @property
    def stage(self) -> Any:
        """The stage class; importing it imports torch."""
        # ruff: noqa: PLC0415 - recipes are read without torch
        match self.name:
            case "pretrain":
                from simmim.tasks.pretrain.stage import PretrainStage

                return PretrainStage
            case "classification":
                from simmim.tasks.classification.stage import ClassificationStage

                return ClassificationStage
            case "segmentation":
                from simmim.tasks.segmentation.stage import SegmentationStage

                return SegmentationStage
            case "detection":
                from simmim.tasks.detection.stage import DetectionStage

                return DetectionStage
            case _:
                from simmim.tasks.video.stage import VideoStage

                return VideoStage


RECIPES: dict[str, type[Any]] = {
    "pretrain": PretrainRecipe,
    "classification": ClassificationRecipe,
    "segmentation": SegmentationRecipe,
    "detection": DetectionRecipe,
    "video": VideoRecipe,
}


def task_named(name: object, source: object) -> Task:
    """Return the task of a recipe's `task` field.

    Args:
        name: value of the field.
        source: the recipe, for the message.

    Raises:
        RecipeError: there is no such task.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise RecipeError(f"recipe {source}: task is {name!r}; choose one of {', '.join(RECIPES)}.")
    return Task(name=name, recipe=RECIPES[name])


def fine_tuning_named(name: object, source: object) -> Task:
    """Return the task of a recipe for `simmim finetune`.

    Raises:
        RecipeError: `simmim finetune` does not train this task.
    """
    if name not in FINE_TUNING:
        raise RecipeError(
            f"recipe {source}: task is {name!r}; simmim finetune trains "
            f"{', '.join(FINE_TUNING)}, simmim pretrain and simmim probe have their own recipes."
        )
    return task_named(name, source)
