"""The command: on one process and on two, on recipes that would train and on others."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import data_prep.cli
from simmim.cli import main
from tests.simmim.forked import FSDP2, finish

QUICK = ["--seconds", "0.2"]


def doctor(config: Path, run: Path, *more: str) -> int:
    return main(["doctor", "--config", str(config), "--folder", str(run), *QUICK, *more])


def test_a_good_recipe_passes_and_nothing_is_written(
    pretrain_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "new"
    assert doctor(pretrain_config, run) == 0
    text = capsys.readouterr().out
    assert " KiB) to train on" in " ".join(text.split())
    assert "0.00 GiB" not in text
    for name in (
        "recipe",
        "run folder",
        "learning rate",
        "schedule",
        "precision",
        "trackers",
        "shards",
        "validation",
        "files",
        "samples",
        "image sizes",
        "channels",
        "statistics",
        "workers",
        "memory",
        "disk",
        "dry step",
        "data speed",
        "compute",
        "duration",
        "checkpoints",
        "evaluation",
    ):
        assert any(line[9:].startswith(name) for line in text.splitlines()), name
    assert "0 problems" in text
    assert not run.parent.exists()


def test_it_checks_whether_a_run_can_resume(
    pretrain_config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    training = ["pretrain", "--config", str(pretrain_config), "--folder", str(run)]
    assert main([*training, "--training.steps", "4"]) == 0

    def found(code: int, *more: str) -> str:
        capsys.readouterr()
        assert doctor(pretrain_config, run, "--training.steps", "4", *more) == code
        return " ".join(capsys.readouterr().out.split())

    assert "is not empty" in found(2)
    assert "after step 4" in found(0, "--resume", "auto")
    moved, others = tmp_path / "moved", tmp_path / "others"
    shutil.copytree(shards, moved)
    assert "after step 4" in found(0, "--resume", "auto", "--data.shards", str(moved))
    images = str(shards.parent / "images" / "circle")
    assert data_prep.cli.main(["shard", images, str(others), "--samples-per-shard", "8"]) == 0
    refused = found(2, "--resume", "auto", "--data.shards", str(others))
    assert "was trained on other images" in refused


def test_it_checks_a_classifier(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del pretrain_values["mask"], pretrain_values["training"]["look_every"]
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(pretrain_values | {"task": "classification"}))
    assert doctor(config, tmp_path / "run") == 0
    text = capsys.readouterr().out
    assert "classification, custom architecture based on tiny at 16 pixels" in text


def test_all_mistakes_of_a_recipe_are_listed(
    pretrain_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = ["--mask.cel", "4", "--data.workers", "many"]
    assert doctor(pretrain_config, tmp_path / "run", *mistakes) == 2
    text = capsys.readouterr().out
    assert "did you mean cell" in text
    assert "data.workers" in text


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (["--data.shards", "nowhere"], "nowhere"),
        (["--training.accumulation", "3"], "accumulation is 3"),
        (["--task", "dance"], "task is 'dance'"),
    ],
)
def test_what_training_would_reject_is_a_problem(
    pretrain_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    part: str,
) -> None:
    assert doctor(pretrain_config, tmp_path / "run", *change) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert part in text
    assert "training would fail" in text


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
def test_all_problems_are_reported_at_once(
    pretrain_values: dict[str, Any],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder in use, a shard that is gone and a tracker that is not installed."""
    copied = shutil.copytree(shards, tmp_path / "shards")
    for tar in copied.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:512])
    pretrain_values["data"] |= {"shards": str(copied), "attempts": 1}
    pretrain_values["training"]["trackers"] = ["mlflow"]
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    assert doctor(config, run) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    problems = [line for line in captured.out.splitlines() if line.startswith("problem")]
    assert [line[9:24].strip() for line in problems] == [
        "run folder",
        "plan",
        "files",
        "shards",
        "data",
    ]
    assert "pip install mlflow" in captured.out


def launched(launcher: Sequence[str], config: Path, run: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "simmim", "doctor", "--config", str(config), "--folder", str(run), *QUICK]
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
        check=False,
    )


TWO = ["-m", "simmim.launch", "--num_processes", "2", "--cpu"]


def on_two(config: Path, run: Path, environment: Mapping[str, str] | None = None) -> str:
    """Return what the command prints on two ranks that no launcher has started."""
    command = ["-m", "simmim", "doctor", "--config", str(config), "--folder", str(run), *QUICK]
    return finish(command, run.with_suffix(".log"), ranks=2, environment=environment)


def test_two_processes_take_the_dry_step_together(pretrain_config: Path, tmp_path: Path) -> None:
    text = on_two(pretrain_config, tmp_path / "run")
    assert "forward and backward on 2 processes (cpu)" in text
    assert text.count("training can start") == 1


def test_two_processes_take_the_dry_step_with_sharded_weights(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    pretrain_values["training"] |= {"checkpoint_every": 2, "keep_every": 4, "keep_last": 2}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    text = on_two(config, tmp_path / "run", FSDP2)
    assert "forward and backward with sharded weights on 2 processes (cpu)" in text
    assert "5 checkpoints of" in text  # the last two, and three of twelve steps


@pytest.mark.slow
def test_a_rank_that_fails_is_named_and_none_waits_for_it(
    pretrain_values: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(shards, tmp_path / "shards")
    for tar in copied.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:512])
    pretrain_values["data"]["shards"] = str(copied)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    done = launched(TWO, config, tmp_path / "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "failed on rank 0, 1 of 2" in done.stdout
    assert done.stdout.count("training would fail") == 1
