"""Ranks that are stopped, killed, hang or fail, and data that goes bad, in real processes."""

import json
import os
import shutil
import signal
import socket
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
from torch.distributed.run import get_args_parser

from data_prep.format.index import read_index
from data_prep.format.manifest import read_manifest
from simmim.engine.checkpoint.directory import complete_checkpoints
from simmim.engine.run import RunFolder
from tests.simmim.forked import finish, forked

FAULTY = str(Path(__file__).with_name("train_faulty.py"))
RANKS = ["--standalone", "--nproc_per_node", "2"]
TORCHRUN = ["-m", "torch.distributed.run", *RANKS]
OURS = ["-m", "simmim.launch", "torchrun", *RANKS]
HAS_TIMEOUT = "--shutdown-timeout" in get_args_parser().format_help()  # since torch 2.9
SOON = ["--shutdown-timeout", "3"] if HAS_TIMEOUT else []
"""Stopped ranks are killed after 3 s instead of 30."""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads other processes' environment"),
    pytest.mark.timeout(600),
]


@contextmanager
def started(
    arguments: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start Python in a new session; at the end all its remaining processes are killed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
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
    shutdown = SOON if number == signal.SIGSTOP else []
    with started([*OURS, *shutdown, *command], log) as process:
        wait_for_step(run, 3, log)
        rank = rank_of(process.pid, 1)
        rank.send_signal(number)
        assert process.wait(timeout=200) == 76, log.read_text()
    text = log.read_text()
    assert f"rank 1 (process {rank.pid} on" in text
    assert "--resume auto" in text or "was killed by SIGKILL" in text
    found = any(part in text for part in ("sent no heartbeat for", "made no progress for"))
    assert found == (number == signal.SIGSTOP)  # on a busy machine the lag is noticed first


def data_workers(family: psutil.Process) -> list[psutil.Process]:
    """Return the data workers among the processes that a command started: forks of ranks."""
    return [
        child
        for child in family.children(recursive=True)
        if "pretrain" in child.cmdline() and child.cmdline() == (child.parent() or child).cmdline()
    ]


@pytest.mark.parametrize(
    ("launcher", "number", "word"),
    [
        (OURS, signal.SIGKILL, "ran out of memory"),
        pytest.param([], signal.SIGKILL, "ran out of memory", marks=pytest.mark.slow),
        pytest.param([], signal.SIGBUS, "/dev/shm", marks=pytest.mark.slow),
        pytest.param([], signal.SIGSEGV, "native code", marks=pytest.mark.slow),
    ],
)
def test_a_data_worker_that_is_killed_ends_the_job_as_lost(
    write_config: Callable[..., Path],
    tmp_path: Path,
    launcher: list[str],
    number: signal.Signals,
    word: str,
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = pretrain(write_config(data={"workers": 1}, rank_timeout=20), run)
    with started([*launcher, *command], log) as process:
        wait_for_step(run, 3, log)
        data_workers(psutil.Process(process.pid))[0].send_signal(number)
        assert process.wait(timeout=200) == 76, log.read_text()
    text = log.read_text()
    assert all(part in text for part in (word, "data.workers", "--resume auto"))
    assert "Traceback" not in text


@pytest.mark.slow
def test_the_rank_that_hosts_the_store_is_named_too(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Ranks that no torchrun started, as srun and mpirun do: the store is in rank 0."""
    run, log = tmp_path / "run", tmp_path / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = pretrain(write_config(rank_timeout=6), run)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    first = place | {"RANK": "0", "LOCAL_RANK": "0"}
    second = place | {"RANK": "1", "LOCAL_RANK": "1"}
    with (
        started(command, tmp_path / "first", first) as process,
        started(command, log, second) as other,
    ):
        wait_for_step(run, 3, log)
        process.send_signal(signal.SIGSTOP)
        assert other.wait(timeout=200) == 76, log.read_text()
    text = log.read_text()
    assert f"rank 0 (process {process.pid}" in text or "rank 0, or the launcher" in text


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_in_its_own_code_is_named(
    write_config: Callable[..., Path], tmp_path: Path, rank: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = faulty(f"hang={rank}@3", write_config(rank_timeout=6), run)
    with started([*OURS, *SOON, *command], log) as process:
        assert process.wait(timeout=200) == 76, log.read_text()
    text = log.read_text()
    assert "made no progress for" in text
    assert f"Rank {rank} (computing, step 3) exits with code 76" in text
    assert "time.sleep(600)" in text  # where the rank hangs


@pytest.mark.slow
def test_the_job_ends_with_the_exit_code_of_the_failed_rank(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with started([*OURS, *faulty("fail=1@3", write_config(), run)], log) as process:
        assert process.wait(timeout=200) == 2, log.read_text()
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
        assert process.wait(timeout=200) == code, log.read_text()
    took = time.monotonic() - began
    step = int(complete_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
    assert f"Stopped at step {step}" in log.read_text()
    assert took < 100  # seconds, on a machine that does much else


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_is_repeated_until_the_end_changes_no_exit_code(
    write_config: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with forked(pretrain(write_config(), run), log) as process:
        wait_for_step(run, 3, log)
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.002)
        assert process.poll() == 75, log.read_text()
    assert "Stopped at step" in log.read_text()


def test_ranks_skip_together_and_name_the_sample_of_one(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = write_config(steps=11, checkpoint_every=1, keep_last=20)
    name = "shard-000003/000000041"
    finish(faulty(f"loss={name}", config, run), log, ranks=2)
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


def damage(shards: Path, every: int) -> set[str]:
    """Overwrite one in `every` images of the set inside the tars; return their names."""
    manifest, damaged = read_manifest(shards), set()
    number = 0
    for shard in manifest.shards:
        index = read_index(shards, shard)
        with (shards / shard.name).open("r+b") as file:
            for row, key in enumerate(index.keys):
                number += 1
                if number % every == 0:
                    file.seek(int(index.offsets[row]))
                    file.write(b"\0" * int(index.sizes[row]))
                    damaged.add(f"{shard.name.removesuffix('.tar')}/{key}")
    return damaged


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


def test_corrupt_images_are_replaced_and_named_on_two_ranks(
    write_config: Callable[..., Path], own_shards: Path, tmp_path: Path
) -> None:
    damaged = damage(own_shards, every=20)  # 5 %
    data = {"shards": str(own_shards), "workers": 1, "validation_shards": 0, "max_bad_share": 0.1}
    run, log = tmp_path / "run", tmp_path / "log"
    finish(pretrain(write_config(data, steps=12), run), log, ranks=2)
    lines = RunFolder(path=run).bad_samples.read_text().splitlines()
    named = [json.loads(line) for line in lines]
    assert {f"{line['shard']}/{line['key']}" for line in named} == damaged
    assert len(named) == len(damaged) == 4  # each once, though both ranks write and epochs repeat
    assert {line["kind"] for line in named} == {"replaced"}
    assert RunFolder(path=run).read_metrics()[-1]["step"] == 12
    assert str(RunFolder(path=run).bad_samples) in log.read_text()


@pytest.mark.slow
def test_too_many_corrupt_images_end_the_job(
    write_config: Callable[..., Path], own_shards: Path, tmp_path: Path
) -> None:
    damage(own_shards, every=2)
    data = {"shards": str(own_shards), "validation_shards": 0, "max_bad_share": 0.01}
    run, log = tmp_path / "run", tmp_path / "log"
    with started([*OURS, *pretrain(write_config(data), run)], log) as process:
        assert process.wait(timeout=200) == 2, log.read_text()
    text = log.read_text()
    assert "more than data.max_bad_share 0.01 allows" in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("amiss", ["removed", "truncated"])
def test_a_damaged_shard_ends_the_job_and_is_named(
    write_config: Callable[..., Path], own_shards: Path, tmp_path: Path, amiss: str, workers: int
) -> None:
    data = {"shards": str(own_shards), "workers": workers, "attempts": 5}
    run, log = tmp_path / "run", tmp_path / "log"
    # An open file outlives its name, so that few may be open.
    few = (
        "import simmim.data.datasets.shards as r; r.OPEN_SHARDS = 1; "
        "import simmim.cli; simmim.cli.run()"
    )
    command = ["-c", few, *pretrain(write_config(data), run)[2:]]
    path = own_shards / "shard-000002.tar"
    with started(command, log) as process:
        wait_for_step(run, 2, log)
        if amiss == "removed":
            path.unlink()
        else:
            os.truncate(path, 1024)
        assert process.wait(timeout=200) == 2, log.read_text()
    text = log.read_text()
    assert "shard-000002.tar" in text.splitlines()[-1]
    assert "after 5 attempts" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert not RunFolder(path=run).bad_samples.is_file()  # no image was blamed for it


def test_a_truncated_shard_that_comes_back_is_waited_for(
    write_config: Callable[..., Path], own_shards: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = write_config({"shards": str(own_shards), "workers": 1}, steps=60)
    path = own_shards / "shard-000002.tar"
    content = path.read_bytes()
    with forked(pretrain(config, run), log) as process:
        wait_for_step(run, 2, log)
        os.truncate(path, 1024)
        wait_until(lambda: "retrying in" in log.read_text(), log)
        path.write_bytes(content)
        assert process.wait(timeout=200) == 0, log.read_text()
    assert "shard-000002.tar has 1,024 bytes and the manifest says" in log.read_text()
