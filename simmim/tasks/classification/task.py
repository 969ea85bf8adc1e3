"""Classification of images, as a task."""

from dataclasses import replace
from typing import Any

from simmim.report.section import Chart, ReportSection, Tile
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.task import PublishedRate, Task


def _load_stage() -> type[Any]:
    from simmim.tasks.classification.stage import ClassificationStage  # noqa: PLC0415 (torch)

    return ClassificationStage


TOP1_REPORT = ReportSection(
    tiles=(Tile(key="top1", title="top-1 %"),),
    baselines={"uniform_loss": "uniform prediction"},
    charts=(Chart(title="Validation, %", names={"top1": "top-1", "top5": "top-5"}),),
)
"""Of classifiers of images and clips."""

TASK = Task(
    name="classification",
    recipe=ClassificationRecipe,
    load_stage=_load_stage,
    rates=(PublishedRate(variants=("base", "large"), lr=1.25e-3, text="5e-3 at 2048"),),
    report=replace(
        TOP1_REPORT,
        tiles=(*TOP1_REPORT.tiles, Tile(key="mean_average_precision", title="mAP %")),
    ),
)
