"""The README's commands exist and take the arguments they are given."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import data_prep.cli
from data_prep.format.command_line import parse_arguments
from simmim.recipe import load
from simmim.tasks.pretrain.recipe import PretrainRecipe
from swinv2 import build_encoder, save_encoder
from tests.commands import bash_lines, check_simmim

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in bash_lines(README)]


def ours(name: str) -> list[list[str]]:
    """Return the arguments of each call of one of our programs."""
    return [words[words.index(name) + 1 :] for words in commands() if name in words]


def test_it_is_short_and_whole() -> None:
    assert len(README.splitlines()) < 150
    assert "@" not in re.sub(r"\S+@\S+\.\S+", "", README)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    called = [words[1] for words in commands() if words[0] == "make"]
    assert called
    assert set(called) <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("words", ours("simmim"), ids=" ".join)
def test_simmim_commands_are_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_simmim(words)


@pytest.mark.parametrize("words", ours("data-prep"), ids=" ".join)
def test_data_prep_commands_are_understood(words: list[str]) -> None:
    parse_arguments(data_prep.cli.app, words)


def test_its_python_moves_an_encoder_to_larger_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    pretrained = build_encoder("tiny", image_size=192, window_size=12, **sizes)
    save_encoder(pretrained, "encoders/mine", mean=(0.5,) * 3, std=(0.5,) * 3)
    text = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert text is not None
    names: dict[str, Any] = {"images": torch.randn(1, 3, 64, 96)}
    exec(textwrap.dedent(text[1]), names)
    assert [feature_map.shape[2:] for feature_map in names["maps"]] == [
        (64 // stride, 96 // stride) for stride in (4, 8, 16, 32)
    ]
    config = names["encoder"].config
    assert (config.image_size, config.window_size) == ((1536, 1536), (48, 48))
    assert config.pretrained_window_sizes == ((12, 12), (12, 12), (12, 12), (6, 6))


def test_files_and_folders_it_names_exist() -> None:
    named = re.findall(r"`((?:simmim|swinv2|data_prep|jobs|tests)/[\w/.]*)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_its_tree_is_the_tree() -> None:
    text = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert text is not None
    named: set[str] = set()
    top = ""
    for line in text[1].splitlines():
        names = re.findall(r"[a-z_]+[0-9]*/", line.strip().split("   ")[0])
        top = top if line.startswith(" ") else names[0]
        named |= {top, *(top + name for name in names if line.startswith(" "))}
    assert named == {
        f"{folder.relative_to(ROOT)}/"
        for package in ("swinv2", "data_prep", "simmim")
        for folder in (ROOT / package, *(ROOT / package).iterdir())
        if (folder / "__init__.py").is_file()
    } | {"jobs/", "tests/"}


def test_its_recipe_is_valid(tmp_path: Path) -> None:
    text = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert text is not None
    (tmp_path / "recipe.yaml").write_text(text[1])
    assert load(PretrainRecipe, tmp_path / "recipe.yaml").encoder.variant == "base"
