"""Settings: their checks, their help, and how they are written."""

import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_prep.bounds import Count, Fraction
from simmim.engine.settings import OptimizerSettings, ScheduleSettings, TrainingSettings
from simmim.fields import describe
from simmim.recipe import (
    RecipeError,
    differences,
    load,
    parse,
    read_values,
    recipe_hash,
    settings,
    to_values,
    to_yaml,
)
from simmim.tasks.all_tasks import task_named
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.probe.recipe import ProbeRecipe
from tests.simmim.example_recipe import Inner, Whole, write

JOBS = Path(__file__).parents[2] / "jobs"
RECIPES: dict[str, Any] = {
    "pretrain": PretrainRecipe,
    "finetune": ClassificationRecipe,
    "probe": ProbeRecipe,
}


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["1e-4", "1e5", ".5e3", "12", "on", "null", "2024-01-01", "~", "1:30", "=", "<<", "- a", "--x"]
)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
WHOLES = st.builds(
    Whole,
    batch_size=st.integers(-(2**63), 2**63 - 1),
    kind=st.sampled_from(["one", "two"]),
    name=TEXT,
    limit=st.none() | FINITE,
    shuffle=st.booleans(),
    inner=st.builds(
        Inner,
        rate=st.floats(0, 1),
        sizes=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple),
    ),
)


@hypothesis_settings(deadline=None)
@given(recipe=WHOLES)
def test_a_written_recipe_reads_as_the_same_recipe(
    recipe: Whole, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    again = load(Whole, path)
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)
    assert recipe_hash(again) == recipe_hash(recipe)
    assert differences(read_values(path), to_values(recipe)) == {}
    assert parse(Whole, to_values(recipe), "values") == recipe


@hypothesis_settings(deadline=None)
@given(one=WHOLES, other=WHOLES)
def test_hash_and_differences_tell_recipes_apart(one: Whole, other: Whole) -> None:
    same = one == other
    assert (recipe_hash(one) == recipe_hash(other)) == (same and to_yaml(one) == to_yaml(other))
    assert (differences(to_values(one), to_values(other)) == {}) == same


def test_differences_name_keys_and_values() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": 3}, "gone": True}
    new = {"a": 1.0, "b": {"c": [1, 3], "d": 3}, "new": "x"}
    assert differences(old, new) == {
        "b.c": "[1, 2] → [1, 3]",
        "gone": "true → null",
        "new": "null → x",
    }


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        Inner().rate = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Inner(0.1)  # type: ignore[misc]
    with pytest.raises(ValueError, match="rate is 2"):
        Inner(rate=2)


def every_settings_class(kind: Any) -> list[Any]:
    found = [kind]
    for hint in get_type_hints(kind).values():
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner):
                found += every_settings_class(inner)
    return found


@pytest.mark.parametrize("recipe_type", [Whole, *RECIPES.values()])
def test_help_shows_every_field_with_type_default_and_meaning(recipe_type: Any) -> None:
    text = describe(recipe_type)
    for kind in every_settings_class(recipe_type):
        for field in fields(kind):
            assert f"{field.name}:" in text or f"{field.name}  " in text
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  --"):
            assert lines[number + 1].startswith("      "), f"{line} is not explained"
            assert "(required)" in line or "(default: " in line


def test_help_shows_types_as_they_are_typed() -> None:
    text = describe(Whole)
    assert "--batch_size  integer (required)" in text
    assert "--kind  one | two (default: one)" in text
    assert "--limit  number or null (default: null)" in text
    assert "--inner.sizes  list of integers (default: [1, 2])" in text
    pairs = describe(RECIPES["pretrain"], "encoder.pretrained_window_sizes")
    assert "--encoder.pretrained_window_sizes  list of [integer, integer], or null" in pairs


def assert_complete(old: Any, new: Any) -> None:
    """Every value of a file stands in the resolved recipe, unchanged."""
    for key, value in old.items():
        if isinstance(value, dict):
            assert_complete(value, new[key])
        else:
            assert new[key] == value


@pytest.mark.parametrize(
    "path",
    [path for kind in RECIPES for path in sorted(JOBS.glob(f"{kind}/*.yaml"))],
    ids=lambda path: path.stem,
)
def test_recipes_of_jobs_resolve_to_files_that_say_the_same(path: Path, tmp_path: Path) -> None:
    values = read_values(path)
    probes = path.parent.name == "probe"  # which trains nothing, and has no task
    recipe_type = RECIPES["probe"] if probes else task_named(values["task"], path).recipe
    recipe = load(recipe_type, path)
    assert_complete(values, to_values(recipe))
    resolved = write(tmp_path, to_yaml(recipe))
    assert load(recipe_type, resolved) == recipe
    assert recipe_hash(load(recipe_type, resolved)) == recipe_hash(recipe)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (OptimizerSettings, {"lr": 0}, "lr is 0"),
        (OptimizerSettings, {"lr": math.nan}, "lr: "),
        (OptimizerSettings, {"lr": 1e-3, "betas": [0.9, 1.0]}, "betas.1 is 1.0"),
        (OptimizerSettings, {"lr": 1e-3, "betas": [0.9]}, "betas"),
        (OptimizerSettings, {"lr": 1e-3, "eps": 0.0}, "eps is 0"),
        (OptimizerSettings, {"lr": 1e-3, "weight_decay": -0.1}, "weight_decay"),
        (OptimizerSettings, {"lr": 1e-3, "layer_decay": 1.5}, "layer_decay is 1.5"),
        (ScheduleSettings, {"kind": "poly"}, "'cosine', 'multistep' or 'linear'"),
        (ScheduleSettings, {"warmup_epochs": 1, "warmup_steps": 1}, "keep one"),
        (ScheduleSettings, {"warmup_steps": -1}, "warmup_steps is -1"),
        (ScheduleSettings, {"min_lr": -1e-5}, "min_lr is -1e-05"),
        (ScheduleSettings, {"kind": "multistep"}, "needs at least one"),
        (ScheduleSettings, {"milestones": [3]}, "milestones belong to kind multistep"),
        (ScheduleSettings, {"kind": "multistep", "milestones": [3, 2]}, "milestones"),
        (ScheduleSettings, {"kind": "multistep", "milestones": [3, 3]}, "milestones"),
        (ScheduleSettings, {"kind": "multistep", "milestones": [0]}, "milestones"),
        (ScheduleSettings, {"kind": "multistep", "milestones": [3], "gamma": 0}, "gamma is 0"),
    ],
)
def test_impossible_settings_of_the_engine(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match="test has 1 mistake") as caught:
        parse(kind, values, "test")
    assert message in str(caught.value)


@settings
class Base:
    """Settings that others extend."""

    count: Count = 1
    """A number."""
    last: int = 3
    """A number that is larger."""

    def __post_init__(self) -> None:
        if self.last <= self.count:
            raise ValueError(f"last is {self.last}; it must be above count.")


@settings
class Other:
    """Settings beside them."""

    share: Fraction = 1.0
    """A share."""

    def __post_init__(self) -> None:
        if self.share == 0.25:
            raise ValueError("share is a quarter.")


@settings
class Both(Base, Other):
    """Settings that extend both, and check nothing themselves."""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count is 0; it must be 1 or more."),
        ({"last": 1}, "last is 1; it must be above count."),
        ({"share": 0.25}, "share is a quarter."),
        ({"share": 0.0, "count": 0}, "share is 0.0; it must be above 0 and at most 1."),
    ],
)
def test_checks_of_all_bases_run_without_and_with_a_recipe(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="is") as direct:
        Both(**values)
    assert message in str(direct.value)
    with pytest.raises(RecipeError) as read:
        parse(Both, values, "test")
    assert message in str(read.value)
    assert Both(count=2) == parse(Both, {"count": 2}, "test")


def test_settings_built_in_python_are_checked() -> None:
    optimizer = OptimizerSettings(lr=1e-3)
    with pytest.raises(ValueError, match=r"batch_size is 0; it must be 1 or more\."):
        TrainingSettings(batch_size=0, steps=1, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"betas is 1\.0; it must be 0 or more and below 1\."):
        replace(optimizer, betas=(0.9, 1.0))


def test_all_numbers_out_of_bounds_are_reported_at_once(pretrain_values: dict[str, Any]) -> None:
    pretrain_values["data"] |= {"scale": [0.5, 0.1], "max_pixels": 0}
    pretrain_values["training"]["batch_size"] = 0
    pretrain_values["training"]["optimizer"]["betas"] = [0.9, 1.0]
    pretrain_values["mask"] = {"ratio": 2.0}
    with pytest.raises(RecipeError) as caught:
        parse(PretrainRecipe, pretrain_values, "test")
    assert str(caught.value).splitlines() == [
        "test has 5 mistakes:",
        "  data.max_pixels is 0; it must be 1 or more.",
        "  data.scale is [0.5, 0.1]; it must be (from, to), above 0 and at most 1.",
        "  mask.ratio is 2.0; it must be above 0 and below 1.",
        "  training.batch_size is 0; it must be 1 or more.",
        "  training.optimizer.betas.1 is 1.0; it must be 0 or more and below 1.",
    ]
