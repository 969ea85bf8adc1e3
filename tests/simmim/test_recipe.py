import json
import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

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

JOBS = Path(__file__).parents[2] / "jobs"
RECIPES: dict[str, Any] = {
    "pretrain": PretrainRecipe,
    "finetune": ClassificationRecipe,
    "probe": ProbeRecipe,
}


@settings
class Inner:
    """A part."""

    rate: float = 0.5
    """Share, from 0 to 1."""
    sizes: tuple[int, ...] = (1, 2)
    """Some sizes in pixels."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; it must be from 0 to 1.")


@settings
class Whole:
    """A recipe."""

    batch_size: int
    """Images a step."""
    kind: Literal["one", "two"] = "one"
    """One or two."""
    name: str = "none"
    """What it is called."""
    limit: float | None = None
    """Limit in steps; null is none."""
    shuffle: bool = True
    """Whether to shuffle."""
    inner: Inner = Inner()
    """Its part."""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *overrides: str) -> Whole:
    return load(Whole, write(folder, text), overrides)


def mistakes(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1e3),
        ("-2e-1", -0.2),
        ("5.e-1", 0.5),
        (".5e-1", 0.05),
        (".5e1", 5.0),
        ("1_0e2", 1000.0),
        ("4.0e-4", 4e-4),
        ("700", 700.0),
        ("0.05", 0.05),
    ],
)
def test_numbers_read_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    limit = read(tmp_path, f"batch_size: 8\nlimit: {text}").limit
    assert limit == pytest.approx(value)
    assert isinstance(limit, float)


@pytest.mark.parametrize("text", ["1e", "e5", "1e-4x", "0x1e-4", "-e-1", "'1e-4'"])
def test_text_that_only_resembles_a_number_is_none(tmp_path: Path, text: str) -> None:
    assert "limit: Input should be a valid number" in mistakes(
        tmp_path, f"batch_size: 8\nlimit: {text}"
    )


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf"])
def test_only_finite_numbers_are_settings(tmp_path: Path, text: str) -> None:
    assert "limit: " in mistakes(tmp_path, f"batch_size: 8\nlimit: {text}")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("batch_size: 8.0", "batch_size"),
        ("batch_size: '8'", "batch_size"),
        ("batch_size: true", "batch_size"),
        ("name: 7", "name"),
        ("shuffle: 1", "shuffle"),
        ("kind: three", "kind"),
        ("inner: {sizes: [1, 2.5]}", "inner.sizes.1"),
        ("inner: [1]", "inner"),
        ("inner:", "inner"),
    ],
)
def test_types_are_strict(tmp_path: Path, line: str, key: str) -> None:
    rest = "" if line.startswith("batch_size") else "batch_size: 8\n"
    text = mistakes(tmp_path, rest + line)
    assert "has 1 mistake:" in text
    assert f"\n  {key}: " in text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("batch_size: 8\nname: a\nbatch_size: 9", 1),
        ("batch_size: 8\ninner:\n  rate: 0.1\n  rate: 0.2", 3),
        ("batch_size: 8\ninner: {rate: 0.1, rate: 0.2}", 2),
    ],
)
def test_a_key_given_twice_is_a_mistake(tmp_path: Path, text: str, line: int) -> None:
    assert f"below line {line}, duplicate keys: " in mistakes(tmp_path, text)


def test_merge_keys_are_not_keys_given_twice(tmp_path: Path) -> None:
    text = """
    batch_size: 8
    a:
      x: &x {<<: &b {rate: 0.1}, rate: 0.2}
    inner: {<<: *x, sizes: [3]}
    """
    values = read_values(write(tmp_path, text))
    assert values["a"]["x"] == {"rate": 0.2}
    assert values["inner"] == {"rate": 0.2, "sizes": [3]}


@pytest.mark.parametrize("key", ["2024-01-01", "7", "on", "1e-4", "null", "<>"])
def test_every_key_is_text(tmp_path: Path, key: str) -> None:
    assert f"\n  {key}: unknown key" in mistakes(tmp_path, f"batch_size: 8\n{key}: x")


def test_unknown_keys_come_with_a_suggestion(tmp_path: Path) -> None:
    text = mistakes(tmp_path, "batch-size: 8\nbatch_size: 8\ninner: {rates: 0.1}\nzzz: 1")
    assert "3 mistakes" in text
    assert "batch-size: unknown key; did you mean batch_size?" in text
    assert "inner.rates: unknown key; did you mean rate?" in text
    assert "zzz: unknown key; legal here: batch_size, kind, name, limit, shuffle, inner." in text


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    text = mistakes(
        tmp_path, "kind: three\nlimit: much\nextra: 1\ninner: {rate: 3.5}", "--name", "[1]"
    )
    assert str(tmp_path / "recipe.yaml") in text
    assert "6 mistakes" in text
    for line in (
        "batch_size: missing; add it.",
        "kind: Input should be 'one' or 'two', got 'three'",
        "limit: Input should be a valid number",
        "extra: unknown key",
        "inner: rate is 3.5; it must be from 0 to 1.",
        "name: Input should be a valid string, got [1]",
    ):
        assert f"\n  {line}" in text


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["--batch_size", "16"], "batch_size", 16),
        (["--batch_size=16"], "batch_size", 16),
        (["--limit", "-1e-3"], "limit", -1e-3),
        (["--limit", "null"], "limit", None),
        (["--name", "a=b"], "name", "a=b"),
        (["--name=a=b"], "name", "a=b"),
        (["--name=--x"], "name", "--x"),
        (["--shuffle", "false"], "shuffle", False),
        (["--kind", "one", "--kind", "two"], "kind", "two"),
        (["--inner.rate", "1"], "inner", Inner(rate=1.0)),
        (["--inner.sizes", "[3, 4, 5]"], "inner", Inner(sizes=(3, 4, 5))),
        (["--inner", "{rate: 0.25}"], "inner", Inner(rate=0.25)),
    ],
)
def test_overrides_replace_single_values(
    tmp_path: Path, overrides: list[str], key: str, value: Any
) -> None:
    recipe = read(tmp_path, "batch_size: 8\nlimit: 3", *overrides)
    assert getattr(recipe, key) == value
    for field in fields(Whole):  # type: ignore[arg-type]
        if field.name != key:
            expected = read(tmp_path, "batch_size: 8\nlimit: 3")
            assert getattr(recipe, field.name) == getattr(expected, field.name)


def test_an_override_keeps_the_other_values_of_its_section(tmp_path: Path) -> None:
    recipe = read(tmp_path, "batch_size: 8\ninner: {sizes: [7]}", "--inner.rate", "0.1")
    assert recipe.inner == Inner(rate=0.1, sizes=(7,))


def test_an_override_may_fill_an_empty_section(tmp_path: Path) -> None:
    recipe = read(tmp_path, "batch_size: 8\ninner:\n  # rate: 0.3\n", "--inner.rate", "0.1")
    assert recipe.inner == Inner(rate=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size", "8"], "'batch_size'"),
        (["--batch_size"], "--batch_size has no value"),
        (["--shuffle", "--name", "x"], "--shuffle has no value"),
        (["--batch_size.x", "8"], "'batch_size' is a value"),
        (["--name", "[1"], "'[1' is not a YAML value"),
        (["--name", "x: [1"], "is not a YAML value"),
        (["--inner", "{rate: 1, rate: 2}"], "duplicate keys: rate"),
        (["--inner.rat", "1"], "did you mean rate?"),
    ],
)
def test_overrides_that_cannot_be_understood(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in mistakes(tmp_path, "batch_size: 8", *overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping"),
        (b"- 1\n- 2", "must be a mapping"),
        (b"batch_size: [1", "is not valid YAML"),
        (b"\xff\xfe\x00", "text"),
        (b"name: \x00", "is not valid YAML"),
        (b"name: !!python/object:os.system x", "is not valid YAML"),
        (b"[1, 2]: 8", "a key is a list or a mapping"),
        (b"inner: &a {rate: *a}", "an alias"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load(Whole, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_paths_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read: .*Give the path of a YAML recipe"):
        load(Whole, tmp_path / name)


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


@pytest.mark.parametrize(
    ("given", "overrides", "expected"),
    [
        ({"epochs": 3}, ["--training.steps", "5"], {"steps": 5}),
        ({"steps": 3}, ["--training.epochs=0.5"], {"epochs": 0.5}),
        ({"steps": 3, "epochs": None}, ["--training.epochs", "2"], {"epochs": 2}),
        ({"epochs": 3}, ["--training.steps", "null"], {"epochs": 3, "steps": None}),
        (
            {"epochs": 3},
            ["--training.steps", "5", "--training.epochs", "4"],
            {"steps": 5, "epochs": 4},
        ),
        (
            {"schedule": {"warmup_epochs": 1, "kind": "cosine"}},
            ["--training.schedule.warmup_steps", "7"],
            {"schedule": {"warmup_steps": 7, "kind": "cosine"}},
        ),
    ],
)
def test_an_override_replaces_its_alternative(
    given: dict[str, Any], overrides: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"training": given}))
    assert read_values(file, overrides) == {"training": expected}
