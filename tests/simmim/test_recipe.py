import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from simmim.recipe import (
    RecipeError,
    load,
    read_values,
)
from tests.simmim.example_recipe import Inner, Whole, read, write


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
