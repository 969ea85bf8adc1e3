"""Recipes that are built to hang, to take memory, or to mean something else than they say."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmim.engine.settings import TrainingSettings
from simmim.recipe import RecipeError, load, parse, read_values, settings, to_yaml
from simmim.recipe_text import RecipeTextError, read_text


@settings
class Small:
    seed: int = 0
    """Seed."""
    rate: float = 0.5
    """Rate."""
    keep: bool = True
    """Whether to keep."""
    names: tuple[str, ...] = ()
    """Names."""


NAMES = "bcdefghij"
BOMBS = {
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{n}: &{n} [{','.join([f'*{chr(ord(n) - 1)}'] * 9)}]\n" for n in NAMES),
    "nested merge keys": "a: &a {x: 1, y: 2}\n"
    + "".join(f"{n}: &{n} {{<<: [{','.join([f'*{chr(ord(n) - 1)}'] * 9)}]}}\n" for n in NAMES),
    "merge keys within merge keys": "a: &a {x: 1}\n"
    + "".join(
        f"{n}: &{n} {{<<: *{chr(ord(n) - 1)}, {n}: [{','.join([f'*{chr(ord(n) - 1)}'] * 99)}]}}\n"
        for n in NAMES
    ),
    "lists": "a: " + "[" * 5000 + "]" * 5000,
    "open lists": "[" * 5000,
    "block lists": "- " * 5000 + "1",
    "mappings": "{a: " * 5000,
    "long number": "seed: " + "9" * 5000,
    "long fraction": "rate: 0." + "9" * 5000,
    "long hexadecimal": "seed: 0x" + "f" * 5000,
    "alias of itself": "a: &a [*a]",
    "merge of itself": "a: &a {<<: *a}",
    "aliases of a long text": f"a: &a '{'x' * 600_000}'\nb: [{', '.join(['*a'] * 90_000)}]",
    "merges of a long text": f"a: &a {{x: {'x' * 600_000}}}\n"
    + "".join(f"b{number}: {{<<: *a}}\n" for number in range(9000)),
    "aliases of aliases": f"a: &a {'x' * 9000}\nb: &b [{','.join(['*a'] * 99)}]\n"
    f"c: [{','.join(['*b'] * 99)}]",
    "large": "a: " + "x" * 2**21,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_at_once(tmp_path: Path, bomb: str) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[bomb])
    began = time.process_time()
    with pytest.raises(RecipeError, match=r"bomb\.yaml: ") as caught:
        read_values(file)
    with pytest.raises(RecipeError, match=r"^--x: "):
        parse(Small, read_values_of("{}", tmp_path, ["--x", BOMBS[bomb]]), "test")
    assert time.process_time() - began < 10
    assert len(str(caught.value)) < 500


def read_values_of(text: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    (folder / "recipe.yaml").write_text(text)
    return read_values(folder / "recipe.yaml", overrides)


def test_ordinary_aliases_and_merge_keys_work() -> None:
    text = "a: &a {b: 1, c: [1, 2]}\nd: {<<: *a, b: 2}\ne: *a\n"
    assert read_text(text)["d"] == {"b": 2, "c": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "1:2:3",
        "-1:30",
        "010",
        "0o10",
        "0b11",
        "2024-01-01",
        "yes",
        "no",
        "on",
        "off",
        ".inf",
        ".nan",
        "=",
        "1.2.3",
        "1e",
    ],
)
def test_what_looks_like_a_number_to_others_is_text(tmp_path: Path, text: str) -> None:
    assert read_text(f"a: {text}") == {"a": text}
    file = tmp_path / "recipe.yaml"
    for field in ("seed", "rate", "keep"):
        file.write_text(f"{field}: {text}")
        with pytest.raises(RecipeError, match=rf"{field}: .*got '{text}'"):
            load(Small, file)
        file.write_text("")
        with pytest.raises(RecipeError, match=rf"{field}: .*got '{text}'"):
            parse(Small, read_values_of("{}", tmp_path, [f"--{field}", text]), "test")
    assert parse(Small, {"names": read_text(f"[{text}]")}, "test").names == (text,)


def test_yes_is_answered_with_true() -> None:
    with pytest.raises(RecipeError, match="write true or false"):
        parse(Small, {"keep": "yes"}, "test")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-4", 1e-4), ("1.5e3", 1500.0), ("+1", 1), ("-0", 0), ("0x1F", 31)),
        *(("1_281_167", 1281167), (".5", 0.5), ("5.", 5.0), ("true", True), ("False", False)),
        *(("~", None), ("null", None), ("", None), ("'010'", "010"), ("-1.5", -1.5)),
    ],
)
def test_plain_values_keep_their_types(text: str, value: object) -> None:
    found = read_text(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("tag", ["!!binary aGk=", "!!set {a}", "!!python/name:os.system x"])
def test_tags_of_other_types_are_refused(tag: str) -> None:
    with pytest.raises(yaml.YAMLError, match="constructor"):
        read_text(f"a: {tag}")
    with pytest.raises(RecipeTextError, match="not a number"):
        read_text("a: !!int x")


def test_text_is_written_so_that_yaml_1_1_reads_it_too() -> None:
    names = ("1:2:3", "010", "yes", "1e4", "2024-01-01", "null", "0x1", "1_0", ".5")
    text = to_yaml(Small(names=names))
    assert tuple(read_text(text)["names"]) == names
    assert tuple(yaml.safe_load(text)["names"]) == names


def test_thousands_of_mistakes_are_counted() -> None:
    with pytest.raises(RecipeError, match="more") as caught:
        parse(Small, {f"a{number}": 1 for number in range(50_000)}, "test")
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("values", [{"seed": 10**5000}, {"names": ["x" * 10**6]}])
def test_values_from_python_are_limited_too(values: dict[str, Any]) -> None:
    values = {**values, "rate": "x"}
    with pytest.raises(RecipeError) as caught:
        parse(Small, values, "test")
    assert len(str(caught.value)) < 1000
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RecipeError, match="nested"):
        parse(Small, {"names": deep}, "test")


@pytest.mark.parametrize(
    "value",
    [
        "!!bool maybe", "!!bool [true]", "!!int [1]", "!!int {a: 1}", "!!float {a: 1}", "!!int ''",
        "!!null [1]", "!!str {a: 1}", "!!seq 3", "!!map 3", "!!timestamp 3", "!!binary 'é'",
        "!!python/name:os.system", "!own 3", r'"\U00110000"', r'"\UFFFFFFFF"', r'"\ud800"',
        r'["\udfff"]', r'{"\ud800": 1}',
    ],
)  # fmt: skip
def test_what_a_tag_or_an_escape_cannot_mean_is_refused_with_its_line(
    tmp_path: Path, value: str
) -> None:
    with pytest.raises(RecipeError, match="line 2"):
        read_values_of(f"seed: 3\nrate: {value}\n", tmp_path, [])
    with pytest.raises(RecipeError, match="--rate"):
        read_values_of("seed: 3", tmp_path, ["--rate", value])


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**22])
def test_integers_beyond_64_bits_are_refused_by_name(number: int) -> None:
    with pytest.raises(RecipeError, match=r"seed: .*64 bits"):
        parse(Small, {"seed": number}, "test")
    assert parse(Small, {"seed": 2**63 - 1}, "test").seed == 2**63 - 1


@pytest.mark.parametrize("length", [{"steps": 10**22}, {"steps": 2**62}, {"epochs": 1e300}])
def test_a_length_that_no_checkpoint_can_count_is_refused(length: dict[str, Any]) -> None:
    values = {"batch_size": 8, "optimizer": {"lr": 0.1}, **length}
    with pytest.raises(ValueError, match=rf"{next(iter(length))}.*64 bits"):
        parse(TrainingSettings, values, "test").total_steps(10**9)
