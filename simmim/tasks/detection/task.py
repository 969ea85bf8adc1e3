"""Object detection and instance segmentation, as a task."""

from typing import Any

from simmim.report.section import ReportSection, Tile
from simmim.tasks.detection.recipe import DetectionRecipe
from simmim.tasks.task import PublishedRate, Task


def _load_stage() -> type[Any]:
    from simmim.tasks.detection.stage import DetectionStage  # noqa: PLC0415 (imports torch)

    return DetectionStage


TASK = Task(
    name="detection",
    recipe=DetectionRecipe,
    load_stage=_load_stage,
    rates=(PublishedRate(variants=("giant",), lr=3.2e-3, text="6e-4 at 96"),),
    report=ReportSection(
        tiles=(
            Tile(key="mask_map", title="mask mAP %"),
            Tile(key="box_map", title="box mAP %"),
        ),
    ),
)
