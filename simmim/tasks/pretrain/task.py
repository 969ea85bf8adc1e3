"""SimMIM pretraining, as a task."""

from collections.abc import Mapping
from typing import Any

from simmim.method.strategies import MaskSettings
from simmim.recipe import parse
from simmim.report.section import ReportSection, Tile
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.task import PublishedRate, Task


def _load_stage() -> type[Any]:
    from simmim.tasks.pretrain.stage import PretrainStage  # noqa: PLC0415 (imports torch)

    return PretrainStage


def describe_masks(values: Mapping[str, Any]) -> str:
    """Return a sentence on the masks of a recipe, given its values; see `ReportSection`."""
    from simmim.method.masking import describe_distance  # noqa: PLC0415 (imports torch)

    masks = parse(MaskSettings, values["mask"], "mask")
    return f"Masks: {describe_distance(masks, int(values['data']['image_size']))}."


TASK = Task(
    name="pretrain",
    recipe=PretrainRecipe,
    load_stage=_load_stage,
    fine_tunes=False,
    rates=(
        PublishedRate(variants=("base",), lr=2e-4, text="8e-4 at 2048, 100 epochs"),
        PublishedRate(variants=("base", "large"), lr=1e-4, text="4e-4 at 2048, 800 epochs"),
        PublishedRate(variants=("giant",), lr=1.4e-3 / 18, text="1.4e-3 at 9216"),
    ),
    report=ReportSection(
        tiles=(
            Tile(key="probe_knn_top1", title="kNN top-1 %"),
            Tile(key="probe_linear_top1", title="linear top-1 %"),
        ),
        baselines={"mean_color_loss": "mean colour", "mean_feature_loss": "mean feature"},
        describe=describe_masks,
    ),
)
