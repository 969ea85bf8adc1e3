"""Commands in jobs/ parse, and every file in it has a complete header."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import data_prep.cli
from data_prep.format.command_line import parse_arguments
from tests.commands import bash_lines, check_simmim

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
FILES = sorted(path for path in JOBS.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix != ".md"]
DOCKERFILE = ("FROM ", "COPY ", "RUN ")
LAUNCHERS = (["accelerate", "launch"], ["python", "-m", "simmim.launch"])


def name(path: Path) -> str:
    return str(path.relative_to(JOBS))


def header(path: Path) -> str:
    """Return the comment at the start of a file, without the comment signs."""
    lines = path.read_text().splitlines()
    lines = lines[1:] if lines[0].startswith("#!") else lines
    comment = []
    for line in lines:
        if not line.startswith("#") or line.startswith("#SBATCH"):
            break
        comment.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(comment)


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the commands in a file's header, or in the code blocks of a Markdown file, as words."""
    if path.suffix == ".md":
        lines = bash_lines(path.read_text())
    else:
        lines = re.findall(r"^  (\S.*)$", re.sub(r"\\\n\s*", "", header(path)), re.MULTILINE)
    for line in lines:
        line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.split("   #")[0].strip())  # noqa: PLW2901
        if line and not line.startswith(("#", *DOCKERFILE)):
            words = shlex.split(line)
            yield words[sum(1 for word in words if re.match("[A-Z_]+=", word)) :]


ALL = [
    pytest.param(words, id=f"{name(path)}: {' '.join(words)[:60]}")
    for path in FILES
    for words in commands(path)
]


def check(words: list[str]) -> None:
    """Fail if a command does not parse."""
    for launcher in LAUNCHERS:
        if words[: len(launcher)] == launcher:
            check_launch(["0" if word == "RANK" else word for word in words[len(launcher) :]])
            return
    match words:
        case ["simmim", *rest]:
            check_simmim(rest)
        case ["torchrun", *rest]:
            check_simmim(rest[rest.index("simmim") + 1 :])
        case ["data-prep", *rest]:
            parse_arguments(data_prep.cli.app, rest)
        case ["kubectl", "apply", "-f", file]:
            assert Path(file).is_file()
        case ["sbatch", *rest]:
            check_sbatch(rest)
        case ["python", script, *rest]:
            runpy.run_path(script)["build_parser"]().parse_args(rest)
        case ["unzip", _] | ["pip", "install", _]:
            pass
        case _:
            pytest.fail(f"no check for this command: {shlex.join(words)}")


def check_launch(words: list[str]) -> None:
    """Parse the arguments of `accelerate launch` and of the program it launches."""
    arguments = launch_command_parser().parse_args(words)
    assert arguments.config_file is None or Path(arguments.config_file).is_file()
    if arguments.training_script != "PROGRAM":  # a placeholder for the reader's own
        assert arguments.module
        assert arguments.training_script == "simmim"
        check_simmim(arguments.training_script_args)


def check_sbatch(words: list[str]) -> None:
    """Parse the command that sbatch wraps, or the arguments of one of our scripts."""
    if "--wrap" in words:
        wrapped = shlex.split(words[words.index("--wrap") + 1])
        check([Path(wrapped[0]).name, *wrapped[1:]])
        return
    (script,) = (word for word in words if word.endswith(".sbatch"))
    assert Path(script).is_file()
    program = ["data-prep", "shard"] if script.endswith("shard.sbatch") else ["simmim"]
    check([*program, *words[words.index(script) + 1 :]])


@pytest.mark.parametrize("words", ALL)
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(words)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_file_has_a_command(path: Path) -> None:
    assert list(commands(path))


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_each_file_names_itself_in_its_command(path: Path) -> None:
    assert any(f"jobs/{name(path)}" in " ".join(words) for words in commands(path))


@pytest.mark.parametrize("folder", ["pretrain", "finetune"])
def test_recipe_headers_are_complete(folder: str) -> None:
    for path in sorted((JOBS / folder).glob("*.yaml")):
        text = header(path)
        for label in ("Paper", "Reaches", "Hardware", "Time", "Command"):
            assert re.search(rf"^{label}:", text, re.MULTILINE), f"{path} has no {label}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_referenced_files_exist(path: Path) -> None:
    named = re.findall(r"\bjobs/[\w./-]*\w", path.read_text())
    assert [file for file in named if not (ROOT / file).exists()] == []


def test_a_wrong_command_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = "--config jobs/pretrain/base-800ep.yaml"
    for wrong in (
        f"accelerate launch --no-such-option -m simmim pretrain {recipe}",
        f"accelerate launch --config_file jobs/accelerate/none.yaml -m simmim pretrain {recipe}",
        f"simmim finetune {recipe}",
        f"simmim pretrain {recipe} --training.batchsize 3",
        "simmim pretrain --config jobs/pretrain/none.yaml",
        "sbatch jobs/slurm/none.sbatch",
        "rm -r runs",
    ):
        with pytest.raises((AssertionError, SystemExit, ValueError, pytest.fail.Exception)):
            check(shlex.split(wrong))
