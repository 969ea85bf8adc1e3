"""Which stage a recipe is for: a new task is one file, and one case here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simmim.engine.stage import Stage
from simmim.recipe import RecipeError
from simmim.tasks.classification.stage import ClassificationRecipe, ClassificationStage
from simmim.tasks.detection.stage import DetectionRecipe, DetectionStage
from simmim.tasks.pretrain.stage import PretrainRecipe, PretrainStage
from simmim.tasks.segmentation.stage import SegmentationRecipe, SegmentationStage
from simmim.tasks.video.stage import VideoRecipe, VideoStage

FINE_TUNING = ("classification", "segmentation", "detection", "video")
"""What `simmim finetune` trains."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task's recipe and what trains it."""

    recipe: type[Any]
    stage: Callable[[Any], Stage]


def task_named(name: object, source: object) -> Task:
    """Return the task of a recipe's `task` field.

    Args:
        name: what stands there.
        source: the recipe, for the message.

    Raises:
        RecipeError: there is no such task.
    """
    match name:
        case "pretrain":
            return Task(recipe=PretrainRecipe, stage=PretrainStage)
        case "classification":
            return Task(recipe=ClassificationRecipe, stage=ClassificationStage)
        case "segmentation":
            return Task(recipe=SegmentationRecipe, stage=SegmentationStage)
        case "detection":
            return Task(recipe=DetectionRecipe, stage=DetectionStage)
        case "video":
            return Task(recipe=VideoRecipe, stage=VideoStage)
        case other:
            known = ", ".join(("pretrain", *FINE_TUNING))
            raise RecipeError(f"recipe {source}: task is {other!r}; it is one of {known}.")


def fine_tuning_named(name: object, source: object) -> Task:
    """Return the task of a recipe for `simmim finetune`.

    Raises:
        RecipeError: it is none of those that it trains.
    """
    if name not in FINE_TUNING:
        raise RecipeError(
            f"recipe {source}: task is {name!r}; simmim finetune trains "
            f"{', '.join(FINE_TUNING)}, simmim pretrain and simmim probe have their own recipes."
        )
    return task_named(name, source)
