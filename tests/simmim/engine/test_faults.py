"""Ranks that are stopped, killed, hang or fail, and data that goes bad, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from simmim.engine.checkpoint import complete_checkpoints
from simmim.engine.run import RunFolder

FAULTY = str(Path(__file__).with_name("train_faulty.py"))
RANKS = ["--standalone", "--nproc_per_node", "2"]
TORCHRUN = ["-m", "torch.distributed.run", *RANKS]
OURS = ["-m", "simmim.engine.torchrun", *RANKS]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tells processes by /proc")


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start python in a session of its own; whatever of it is left at the end is killed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=30)


def wait_until(reached: Callable[[], bool], log: Path, patience: float = 240) -> None:
    deadline = time.monotonic() + patience
    while not reached():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def wait_for_step(run: Path, step: int, log: Path) -> None:
    folder = RunFolder(path=run)
    wait_until(lambda: any(line["step"] >= step for line in folder.read_metrics()), log)


def rank_of(launcher: int, rank: int) -> psutil.Process:
    """Return the process of a rank; its data workers are children of it."""
    for child in psutil.Process(launcher).children(recursive=True):
        parent = child.parent()
        if child.environ().get("RANK") == str(rank) and (
            parent is not None and parent.environ().get("RANK") is None
        ):
            return child
    raise AssertionError(f"there is no rank {rank}")


@pytest.fixture
def write_config(pretrain_values: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe with other settings for training and data."""

    def write(data: dict[str, Any] | None = None, **training: Any) -> Path:
        long = {"steps": 5000, "checkpoint_every": 5000, "validate_every": 5000, "log_every": 1}
        values = pretrain_values | {
            "training": pretrain_values["training"] | long | {"look_every": 5000} | training,
            "data": pretrain_values["data"] | (data or {}),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def pretrain(config: Path, run: Path, *more: str) -> list[str]:
    return ["-m", "simmim", "pretrain", "--config", str(config), "--folder", str(run), *more]


def faulty(fault: str, config: Path, run: Path, *more: str) -> list[str]:
    return [FAULTY, fault, *pretrain(config, run, *more)[2:]]


def anomalies(run: Path) -> list[dict[str, Any]]:
    lines = RunFolder(path=run).anomalies.read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_stopped_or_killed_ends_the_job_and_is_named(
    write_config: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = pretrain(write_config(rank_timeout=6), run)
    shutdown = ["--shutdown-timeout", "3"] if number == signal.SIGSTOP else []
    with started([*OURS, *shutdown, *command], log) as process:
        wait_for_step(run, 3, log)
        rank = rank_of(process.pid, 1)
        rank.send_signal(number)
        assert process.wait(timeout=120) == 76, log.read_text()
    text = log.read_text()
    assert f"rank 1 (process {rank.pid} on" in text
    assert "--resume auto" in text or "was killed by SIGKILL" in text
    assert ("gave no sign of life for" in text) == (number == signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_in_its_own_code_is_named(
    write_config: Callable[..., Path], tmp_path: Path, rank: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = faulty(f"hang={rank}@3", write_config(rank_timeout=6), run)
    with started([*OURS, "--shutdown-timeout", "3", *command], log) as process:
        assert process.wait(timeout=120) == 76, log.read_text()
    text = log.read_text()
    assert "made no progress for" in text
    assert f"Rank {rank} ends with code 76; it stood at: computing, step 3" in text
    assert "time.sleep(600)" in text  # where the rank hangs


@pytest.mark.slow
def test_a_rank_that_fails_is_what_the_job_ends_with(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with started([*OURS, *faulty("fail=1@3", write_config(), run)], log) as process:
        assert process.wait(timeout=120) == 2, log.read_text()
    text = log.read_text()
    assert "simmim pretrain: the fault that was asked for" in text
    assert "a rank was lost, and training needs all: rank 1" in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("launcher", "code"), [(TORCHRUN, 1), (OURS, 75)])
def test_a_signal_to_the_launcher_ends_with_a_checkpoint(
    write_config: Callable[..., Path],
    tmp_path: Path,
    number: signal.Signals,
    launcher: list[str],
    code: int,
) -> None:
    if launcher is TORCHRUN and number == signal.SIGUSR1:
        launcher = [*TORCHRUN, "--signals-to-handle", "SIGTERM,SIGUSR1"]
    run, log = tmp_path / "run", tmp_path / "log"
    command = pretrain(write_config(data={"workers": 1}), run)
    with started([*launcher, *command], log) as process:
        wait_for_step(run, 3, log)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=60) == code, log.read_text()
    took = time.monotonic() - began
    step = int(complete_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
    assert f"Stopped at step {step}" in log.read_text()
    assert took < 20


def test_ranks_skip_together_and_name_the_sample_of_one(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = write_config(steps=11, checkpoint_every=1, keep_last=20)
    name = "shard-000003/000000041"
    with started([*OURS, *faulty(f"loss={name}", config, run)], log) as process:
        assert process.wait(timeout=120) == 0, log.read_text()
    found = anomalies(run)
    assert found
    assert {line["what"] for line in found} == {"loss"}
    assert {tuple(line["samples"]) for line in found} == {(name,)}
    skipped = [line["step"] for line in found]
    lines = [line for line in RunFolder(path=run).read_metrics() if "skipped" in line]
    assert [line["step"] for line in lines if "loss" not in line] == skipped
    assert lines[-1]["skipped"] == len(skipped)
    saved = {int(path.name[5:]) for path in complete_checkpoints(run / "checkpoints")}
    assert saved >= set(range(1, 12)) - set(skipped)
    assert f"the loss of {name} is not finite" in log.read_text()
