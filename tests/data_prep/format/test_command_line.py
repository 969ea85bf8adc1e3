"""Arguments declared by signatures: what help shows, and what is said of mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.cli import app, main

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shrad"], "data-prep: Unknown command shrad. Did you mean shard?"),
        (
            ["--hlep"],
            "data-prep: Unknown option: --hlep. Did you mean --help? See data-prep --help.",
        ),
        (["info", "--hlep"], "Unknown option: --hlep. Did you mean --help? See data-prep info"),
        (["--nothing"], "data-prep: Unknown option: --nothing. See data-prep --help."),
        (["shard", "a"], "data-prep shard: FOLDER is missing: add it."),
        (["shard", "a", "b", "--worker", "2"], "Unknown option: --worker. Did you mean --workers?"),
        (["shard", "a", "b", "--foo"], "Unknown option: --foo. See data-prep shard --help."),
        (["shard", "a", "b", "--workers"], "--workers has no value: add one."),
        (["shard", "a", "b", "--workers", "0"], "--workers is 0; it must be 1 or more."),
        (["shard", "a", "b", "c"], "'c' is one argument too many: remove it."),
        (["shard", "a", "b", "--part", "3/2"], "'3/2' is not from 1/N to N/N."),
        (["shard", "a", "b", "--format", "gif"], 'Choose from: "keep", "jpeg"'),
        (["shard", "a", "b", "--quality", "0"], "--quality is 0; it must be from 1 to 100."),
        (["verify", "a", "--deep", "--fast"], "--fast repeats an option, or is its opposite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_with_its_remedy(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr()
    assert main(["--help"]) == 0
    assert alone.out == capsys.readouterr().out
    assert "  shard " in alone.out
    assert not alone.err


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdecimal()


@pytest.mark.parametrize("command", ["shard", "reshard", "merge", "index", "verify", "info"])
def test_help_fits_two_screens(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100


@pytest.mark.skipif(sys.version_info < (3, 11), reason="cyclopts for Python 3.10 shows no values")
def test_help_shows_a_part_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", "--help"]) == 0
    assert "  --part I/N  " in capsys.readouterr().out


def test_help_shows_the_bounds_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command, texts in {
        "shard": (
            "(1 or more; default: 536870912)",
            "(from 0 to 16)",
            "(from 1 to 100; default: 95)",
            "(from 0 to 1; default: 0.05)",
            "(keep, jpeg, png, webp; default: keep)",
        ),
        "merge": ("(from 0 to 1; default: 0.05)",),
        "verify": ("Number of processes. (1 or more; default:",),
    }.items():
        assert main([command, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert [text for text in texts if text not in shown] == []


@pytest.mark.parametrize("arguments", [["shard", "a", "b"], ["reshard", "a", "b"], ["merge", "a"]])
def test_fractions_are_bounded(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--max-rejected", "2.0"]) == 2
    assert "--max-rejected is 2.0; it must be from 0 to 1." in capsys.readouterr().err


def test_the_last_of_several_values_counts(capsys: pytest.CaptureFixture[str]) -> None:
    for first, last in (("0", "1"), ("1", "0")):
        code = main(["verify", "/nowhere", "--workers", first, "--workers", last])
        assert code == 2
        assert ("must be 1 or more" in capsys.readouterr().err) == (last == "0")


def test_completion_knows_every_command_and_option() -> None:
    script = app.generate_completion(shell="bash")
    for name in ("reshard", "--samples-per-shard", "--max-side", "--channels-last", "--part"):
        assert name in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert done.returncode == 0


def test_a_shell_that_is_unknown_is_one_mistake(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "--install-completion"],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": "", "SHELL": "/bin/unheard-of"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "add bash, zsh or fish" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
