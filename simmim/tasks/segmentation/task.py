"""Semantic segmentation, as a task."""

from typing import Any

from simmim.report.section import ReportSection, Tile
from simmim.tasks.segmentation.recipe import SegmentationRecipe
from simmim.tasks.task import PublishedRate, Task


def _load_stage() -> type[Any]:
    from simmim.tasks.segmentation.stage import SegmentationStage  # noqa: PLC0415 (imports torch)

    return SegmentationStage


TASK = Task(
    name="segmentation",
    recipe=SegmentationRecipe,
    load_stage=_load_stage,
    rates=(PublishedRate(variants=("giant",), lr=6.4e-4, text="4e-5 at 32"),),
    report=ReportSection(
        tiles=(Tile(key="miou", title="mIoU %"),),
        baselines={"uniform_loss": "uniform prediction"},
    ),
)
