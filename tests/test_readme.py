"""The README's commands exist and take the arguments they are given."""

import re
import shlex
from pathlib import Path

import pytest

import data_prep.cli
import simmim.cli
from simmim.recipe import load
from simmim.stages.pretrain import PretrainRecipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    text = "\n".join(line.split("   #")[0] for block in blocks for line in block.splitlines())
    joined = re.sub(r"\\\n\s*", "", text)
    return [shlex.split(line) for line in joined.splitlines() if line.strip()]


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
    arguments, overrides = simmim.cli.build_parser().parse_known_args(words)
    assert arguments.takes_overrides or not overrides
    if arguments.takes_overrides:
        load(arguments.recipe_type, arguments.config, overrides)


@pytest.mark.parametrize("words", ours("data-prep"), ids=" ".join)
def test_data_prep_commands_are_understood(words: list[str]) -> None:
    data_prep.cli._parser().parse_args(words)


def test_files_and_folders_it_names_exist() -> None:
    named = re.findall(r"`((?:simmim|swinv2|data_prep|jobs|tests)/[\w/.]*)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_its_recipe_is_valid(tmp_path: Path) -> None:
    text = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert text is not None
    (tmp_path / "recipe.yaml").write_text(text[1])
    assert load(PretrainRecipe, tmp_path / "recipe.yaml").encoder.variant == "base"
