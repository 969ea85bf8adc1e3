"""Classification of clips, as a task."""

from typing import Any

from simmim.tasks.classification.task import TOP1_REPORT
from simmim.tasks.task import PublishedRate, Task
from simmim.tasks.video.recipe import VideoRecipe


def _load_stage() -> type[Any]:
    from simmim.tasks.video.stage import VideoStage  # noqa: PLC0415 (imports torch)

    return VideoStage


TASK = Task(
    name="video",
    recipe=VideoRecipe,
    load_stage=_load_stage,
    rates=(
        PublishedRate(variants=("giant",), lr=2.3e-3, text="3.6e-4 at 80, 256 pixels"),
        PublishedRate(variants=("giant",), lr=4e-4, text="5e-5 at 64, 320 pixels"),
    ),
    report=TOP1_REPORT,
)
