"""Training in separate processes: several ranks, signals and kills."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from simmim.engine.checkpoint.directory import OPTIMIZER, complete_checkpoints
from simmim.engine.checkpoint.ema import read_average
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.checkpoint.shard_files import ShardFiles
from simmim.engine.run import RunFolder
from tests.simmim.forked import finish, forked

PRETRAIN = ["-m", "simmim", "pretrain"]
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start Python in a new session; at the end all its remaining processes are killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def wait_until(reached: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def wait_for_step(run: Path, step: int, log: Path) -> None:
    metrics = RunFolder(path=run)
    wait_until(lambda: any(line["step"] >= step for line in metrics.read_metrics()), log)


def losses(run: Path) -> dict[int, float]:
    lines = RunFolder(path=run).read_metrics()
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_ending(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    ends = [complete_checkpoints(run / "checkpoints")[-1] for run in (one, other)]
    first, second = (read_model(end) for end in ends)
    assert all(torch.equal(first[name], second[name]) for name in first)


def arguments(config: Path, run: Path, *more: str) -> list[str]:
    return [*PRETRAIN, "--config", str(config), "--folder", str(run), *more]


def test_one_and_two_processes_train_alike(pretrain_config: Path, tmp_path: Path) -> None:
    still = ("--training.steps", "6", "--data.workers", "1")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(arguments(pretrain_config, one, *still), tmp_path / "one.log")
    finish(arguments(pretrain_config, two, *still), tmp_path / "two.log", ranks=2)
    assert {line.get("processes", 2) for line in RunFolder(path=two).read_metrics()} == {2}
    rates = [
        [line["lr"] for line in RunFolder(path=run).read_metrics() if "lr" in line]
        for run in (one, two)
    ]
    assert rates[0] == rates[1]
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint_that_can_be_resumed(
    pretrain_config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    log = tmp_path / "log"
    steps = ("--training.steps", "40", "--training.checkpoint_every", "1000", "--data.workers", "1")
    with forked(arguments(pretrain_config, broken, *steps), log) as process:
        wait_for_step(broken, 4, log)
        process.send_signal(number)  # the workers get it too
        assert process.wait(timeout=200) == 75, log.read_text()
    assert "--resume auto" in log.read_text()
    stopped_at = complete_checkpoints(broken / "checkpoints")[-1].name
    assert "step-00000004" <= stopped_at < "step-00000040"
    finish(arguments(pretrain_config, broken, *steps, "--resume", "auto"), log)
    finish(arguments(pretrain_config, whole, *steps), log)
    assert_same_ending(whole, broken)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install 'simmim[8bit]'")
def test_two_ranks_resume_8_bit_states_and_the_average(
    pretrain_config: Path, tmp_path: Path
) -> None:
    whole, resumed, log = tmp_path / "whole", tmp_path / "resumed", tmp_path / "log"
    settings = ["--training.optimizer.name", "adamw_8bit", "--training.ema_decay", "0.9"]
    settings += ["--encoder.embed_dim", "32", "--training.checkpoint_every", "4"]
    finish(arguments(pretrain_config, whole, *settings), log, ranks=2)
    middle = complete_checkpoints(whole / "checkpoints")[0]
    again = [*settings, "--resume", str(middle)]
    finish(arguments(pretrain_config, resumed, *again), log, ranks=2)
    ends = [complete_checkpoints(run / "checkpoints")[-1] for run in (whole, resumed)]
    assert middle.name < ends[0].name == ends[1].name
    for read in (read_model, read_average, read_states):
        first, second = (read(end) for end in ends)
        assert first.keys() == second.keys() != set()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.uint8 in {tensor.dtype for tensor in read_states(ends[0]).values()}


def read_states(checkpoint: Path) -> dict[str, torch.Tensor]:
    with ShardFiles(checkpoint, OPTIMIZER) as files:
        return files.read_all()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_two_ranks_stop_and_resume(
    pretrain_config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    log = tmp_path / "log"
    steps = ("--training.steps", "60", "--training.checkpoint_every", "10", "--data.workers", "1")
    with started([*TWO_PROCESSES, *arguments(pretrain_config, broken, *steps)], log) as process:
        wait_for_step(broken, 14, log)
        if number == signal.SIGKILL:  # as a power cut: nobody is left to write a checkpoint
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        else:  # the launcher may be gone before the ranks have stopped
            os.killpg(process.pid, number)
            wait_until(lambda: "Stopped at step" in log.read_text(), log)
        assert process.wait(timeout=60) != 0
    if number != signal.SIGKILL:
        steps_saved = complete_checkpoints(broken / "checkpoints")[-1].name
        assert f"Stopped at step {int(steps_saved.removeprefix('step-'))}" in log.read_text()
    finish(arguments(pretrain_config, broken, *steps, "--resume", "auto"), log, ranks=2)
    finish(arguments(pretrain_config, whole, *steps), log, ranks=2)
    assert_same_ending(whole, broken)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the end of a parent")
@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_stop_when_only_their_launcher_gets_a_signal(
    pretrain_config: Path, tmp_path: Path, processes: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--cpu"]
    steps = ("--training.steps", "5000", "--training.checkpoint_every", "5000")
    with started([*launch, *arguments(pretrain_config, run, *steps)], log) as process:
        wait_for_step(run, 4, log)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs(ranks, timeout=30)
    assert not left, log.read_text()
    stopped_at = complete_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-")
    assert f"Stopped at step {int(stopped_at)}" in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the end of a parent")
def test_ranks_end_with_their_killed_launchers(pretrain_config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    steps = ("--training.steps", "5000", "--training.checkpoint_every", "5000")
    with started([*TWO_PROCESSES, *arguments(pretrain_config, run, *steps)], log) as process:
        wait_for_step(run, 4, log)
        ranks = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)  # accelerate and torchrun; ranks have sessions
        _, left = psutil.wait_procs(ranks, timeout=30)
    assert not left, log.read_text()
