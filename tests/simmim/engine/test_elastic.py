"""Resuming after kills and with other processes: the same samples, losses and weights."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

import data_prep.cli
from simmim.engine.checkpoint.directory import OPTIMIZER, complete_checkpoints
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.checkpoint.shard_files import ShardFiles
from simmim.engine.run import RunFolder
from simmim.export.export import export
from swinv2 import load_encoder
from tests.simmim.forked import Job, forked

PROGRAM = str(Path(__file__).with_name("note_keys.py"))
FSDP2 = Path(__file__).parents[3] / "jobs" / "accelerate" / "fsdp2.yaml"
SHARDED = ["-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", "2"]
DATA = Path(os.environ.get("SIMMIM_DATA", "data"))
"""Folder of cifar10.zip."""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the end of a parent"),
    pytest.mark.timeout(3600),  # many starts, each of seconds, or minutes on a busy machine
]


def torchrun(processes: int, *more: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone"]
    return [*launch, *more, "--nproc_per_node", str(processes)]


@contextmanager
def started(launch: list[str] | int, config: Path, run: Path, *more: str) -> Iterator[Any]:
    """Start a training of `config` in the folder `run`; whatever is left at the end is killed.

    By a launcher, or in so many processes without one.
    """
    noting = [PROGRAM, str(run.with_suffix(".keys"))]
    stop = [more[0], more[1]] if more[:1] == ("--stop-at",) else []
    rest = more[len(stop) :]
    command = [*noting, *stop, "pretrain", "--config", str(config), "--folder", str(run), *rest]
    if isinstance(launch, int):
        with forked(command, run.with_suffix(".log"), launch) as job:
            yield job
        return
    with run.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *launch, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a launcher, its ranks and their workers at once, as a power cut does."""
    with suppress(psutil.NoSuchProcess):
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in tree:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(tree, timeout=30)
    process.wait(timeout=30)


def end_of(process: "subprocess.Popen[bytes] | Job", run: Path, patience: float = 600) -> int:
    """Return the exit code; after `patience` seconds, fail with the stack of every process."""
    try:
        return process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        started = process.pids if isinstance(process, Job) else [process.pid]
        family = [psutil.Process(pid) for pid in started if psutil.pid_exists(pid)]
        children = [child for one in family for child in one.children(recursive=True)]
        for member in reversed([*(family if isinstance(process, Job) else ()), *children]):
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGABRT)  # faulthandler prints where it was
                member.wait(timeout=10)
        text = run.with_suffix(".log").read_text()[-12000:]
        pytest.fail(f"has not ended after {patience:.0f} s:\n{text}")


def go(launch: list[str] | int, config: Path, run: Path, *more: str, code: int | None = 0) -> None:
    with started(launch, config, run, *more) as process:
        ended = end_of(process, run)
    if code is None:
        assert "Stopped at step" in run.with_suffix(".log").read_text()
    else:
        assert ended == code, run.with_suffix(".log").read_text()[-3000:]


def keys(run: Path) -> dict[int, list[list[int]]]:
    """Return the samples of each global batch in their order, whatever ranks took them.

    A step that was taken twice, or that a kill cut short, must have had the same ones each time.
    """
    noted: dict[tuple[int, str], dict[int, list[list[int]]]] = {}
    for path in run.parent.glob(f"{run.stem}.keys.*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                found = json.loads(line)
                parts = noted.setdefault((found["step"], found["start"]), {})
                parts.setdefault(found["rank"], []).extend(found["keys"])
    batches: dict[int, list[list[list[int]]]] = {}
    for (step, _), parts in noted.items():
        batches.setdefault(step, []).append([key for rank in sorted(parts) for key in parts[rank]])
    for taken in batches.values():
        taken.sort(key=len)
        assert all(key in taken[-1] for keys in taken for key in keys)
    return {step: batches[step][-1] for step in sorted(batches)}


def losses(run: Path) -> dict[int, float]:
    lines = RunFolder(path=run).read_metrics()
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def rates(run: Path) -> dict[int, float]:
    lines = RunFolder(path=run).read_metrics()
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def probes(run: Path) -> list[tuple[int, float]]:
    lines = RunFolder(path=run).read_metrics()
    found = [line for line in lines if "probe_knn_top1" in line]
    return [(line["step"], line["probe_knn_top1"]) for line in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model(complete_checkpoints(run / "checkpoints")[-1])


def states(run: Path) -> dict[str, torch.Tensor]:
    """Return the optimiser's tensors in the last checkpoint, and the running averages."""
    with ShardFiles(complete_checkpoints(run / "checkpoints")[-1], OPTIMIZER) as files:
        return files.read_all()


def assert_alike(one: Path, other: Path) -> None:
    assert keys(one) == keys(other)
    assert rates(one) == rates(other)
    assert losses(one).keys() == losses(other).keys()
    for step, loss in losses(one).items():
        assert losses(other)[step] == pytest.approx(loss, rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(other)[name], tensor, rtol=1e-4, atol=1e-5)


def assert_same(one: Path, other: Path) -> None:
    assert keys(one) == keys(other)
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def config(pretrain_values: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe of eight steps with a line and a checkpoint for every second."""
    pretrain_values["training"] |= {"steps": 8, "checkpoint_every": 2, "validate_every": 8}
    pretrain_values["training"] |= {"log_every": 1, "look_every": 8}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(pretrain_values))
    return path


def test_sharded_checkpoint_of_two_ranks_resumes_in_one_process(
    config: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    values = yaml.safe_load(config.read_text())
    values["probe"] = {"shards": values["data"]["shards"], "every": 4}  # before step 1, too
    config.write_text(yaml.safe_dump(values))
    go(1, config, whole)
    go(SHARDED, config, broken, "--stop-at", "3", code=None)
    saved = complete_checkpoints(broken / "checkpoints")[-1]
    assert saved.name == "step-00000004"
    assert len(list(saved.glob("*-of-00002.safetensors"))) == 4
    export(broken, tmp_path / "encoder", "native")  # in a process without ranks
    halves = ("--training.accumulation", "2", "--data.workers", "1", "--resume", "auto")
    go(1, config, broken, *halves)
    assert_alike(whole, broken)
    assert [step for step, _ in probes(broken)] == [0, 4, 8]
    assert probes(broken) == probes(whole)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (load_encoder(run / "encoder")(images) for run in (whole, broken))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sharded_training_equals_ddp_and_resumes(config: Path, tmp_path: Path) -> None:
    whole, shards, broken = tmp_path / "whole", tmp_path / "shards", tmp_path / "broken"
    go(torchrun(2), config, whole)
    go(SHARDED, config, shards)
    assert_alike(whole, shards)
    go(1, config, broken, "--stop-at", "3", code=75)
    go(SHARDED, config, broken, "--training.accumulation", "2", "--resume", "auto")
    assert_alike(whole, broken)
    for run in (whole, shards, broken):
        export(run, tmp_path / f"{run.name}-encoder", "native")
        assert (run / "encoder" / "model.safetensors").is_file()


@pytest.mark.slow
def test_sharded_averages_resume_bit_for_bit(config: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    averaging = ("--training.ema_decay", "0.9")
    go(SHARDED, config, whole, *averaging)
    go(SHARDED, config, broken, "--stop-at", "3", *averaging, code=None)
    shutil.copytree(broken, tmp_path / "alone")
    go(SHARDED, config, broken, *averaging, "--resume", "auto")
    assert_same(whole, broken)
    first, second = (states(run) for run in (whole, broken))
    assert first.keys() == second.keys()
    assert {name.partition("/")[0] for name in first} == {"ema", "exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    go(1, config, tmp_path / "alone", *averaging, "--resume", "auto")
    for name, tensor in states(tmp_path / "alone").items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ranks_fall_back_from_a_damaged_checkpoint_together(config: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    go(SHARDED, config, whole)
    shutil.copytree(whole, broken)
    last = complete_checkpoints(broken / "checkpoints")[-1]
    file = last / "optimizer-00001-of-00002.safetensors"  # the second rank verifies every other
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    go(SHARDED, config, broken, "--resume", "auto")
    assert (last.parent / f"rejected-{last.name}").is_dir()
    first, second = weights(whole), weights(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_processes_and_workers_may_change_on_resume(config: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    go(1, config, whole)
    go(1, config, broken, "--stop-at", "1", code=75)
    more = ("--resume", "auto", "--data.workers")
    go(torchrun(2), config, broken, "--stop-at", "4", *more, "3", code=None)
    assert complete_checkpoints(broken / "checkpoints")[-1].name == "step-00000005"
    go(1, config, broken, *more, "1", "--training.accumulation", "4")
    assert_alike(whole, broken)


@pytest.mark.slow
def test_torchrun_restarts_ranks_that_resume(config: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    go(torchrun(2), config, whole)
    with started(torchrun(2, "--max-restarts", "2"), config, broken) as process:
        wait_for(lambda: len(complete_checkpoints(broken / "checkpoints")) > 1, process, broken)
        ranks = psutil.Process(process.pid).children()
        ranks[-1].kill()
        assert end_of(process, broken) == 0, broken.with_suffix(".log").read_text()[-3000:]
    assert_same(whole, broken)


def wait_for(reached: Any, process: Any, run: Path, patience: float = 600) -> None:
    """Wait until something is so, or the training has ended."""
    deadline = time.monotonic() + patience
    while not reached() and process.poll() is None:
        assert time.monotonic() < deadline, run.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.001)


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.writing"))


def kill_and_go_on(config: Path, run: Path, kills: int, chance: random.Random) -> None:
    """Train to the end through this many kills, half of them while a checkpoint is written."""
    for number in range(kills):
        with started(2, config, run, "--resume", "auto") as process:
            before = len(losses(run))
            steps = chance.randrange(1, 4)
            wait_for(lambda: len(losses(run)) >= before + steps, process, run)  # noqa: B023
            if number % 2:
                wait_for(lambda: is_writing(run), process, run)
            else:
                time.sleep(chance.uniform(0, 0.05))
            assert process.poll() is None, "ended before it was killed: give it more steps"
            process.kill()
    go(2, config, run, "--resume", "auto")


def test_two_kills_change_nothing(config: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more_steps(config, steps=14, workers=1)
    go(2, config, whole)
    kill_and_go_on(config, broken, 2, random.Random(0))
    assert_same(whole, broken)


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "cifar10.zip").is_file(), reason="SIMMIM_DATA names no folder with cifar10.zip"
)
def test_twenty_kills_change_nothing(config: Path, tmp_path: Path) -> None:
    source, shards = str(DATA / "cifar10.zip"), str(tmp_path / "shards")
    assert data_prep.cli.main(["shard", source, shards, "--samples-per-shard", "2000"]) == 0
    more_steps(config, steps=140, workers=2, shards=shards)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    go(torchrun(2), config, whole)
    kill_and_go_on(config, broken, 20, random.Random(1))
    assert_same(whole, broken)


def more_steps(config: Path, *, steps: int, workers: int, shards: str | None = None) -> None:
    values = yaml.safe_load(config.read_text())
    values["training"] |= {"steps": steps, "validate_every": steps, "look_every": steps}
    values["data"]["workers"] = workers
    values["data"]["shards"] = shards or values["data"]["shards"]
    config.write_text(yaml.safe_dump(values))
