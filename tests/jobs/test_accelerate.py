"""The configs in jobs/accelerate/ are accepted by accelerate, and train."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from accelerate.commands import config
from accelerate.utils import DistributedType

from simmim.engine.run import RunFolder

ACCELERATE = Path(__file__).parents[2] / "jobs" / "accelerate"
FILES = sorted(ACCELERATE.glob("*.yaml"))
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_accepts_each_file(path: Path) -> None:
    values = config.load_config_from_file(str(path))  # refuses unknown keys
    assert values.num_processes % values.num_machines == 0
    assert (values.mixed_precision or "no") in ("no", "bf16")  # else it would override the recipe's


def test_files_match_their_names() -> None:
    kinds = {
        path.stem: (values.distributed_type, values.num_machines, values.num_processes)
        for path in FILES
        for values in [config.load_config_from_file(str(path))]
    }
    assert kinds["cpu"] == (DistributedType.MULTI_CPU, 1, 2)
    assert kinds["one-gpu"] == (DistributedType.NO, 1, 1)
    assert kinds["one-node"] == (DistributedType.MULTI_GPU, 1, 8)
    assert kinds["many-nodes"] == (DistributedType.MULTI_GPU, 4, 32)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train(launches: Sequence[Sequence[str]], recipe: Path, run: Path) -> None:
    """Launch the recipe once per list of options, concurrently, as on several machines."""
    # On the CPU, even if there are GPUs.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ours = ["-m", "simmim", "pretrain", "--config", str(recipe), "--folder", str(run)]
    with ExitStack() as stack:
        started = []
        for options in launches:
            process = stack.enter_context(
                subprocess.Popen(
                    [*LAUNCH, *options, *ours],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment,
                )
            )
            stack.callback(kill_group, process)
            started.append(process)
        for process in started:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output.decode()


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "options", "processes"),
    [
        ("cpu", [], 2),
        pytest.param("one-gpu", [], 1, marks=pytest.mark.slow),
        pytest.param("one-node", ["--num_processes", "2"], 2, marks=pytest.mark.slow),
    ],
)
def test_each_file_trains_on_one_machine(
    name: str, options: list[str], processes: int, recipe: Path, tmp_path: Path
) -> None:
    file = ["--config_file", str(ACCELERATE / f"{name}.yaml")]
    train([[*file, *options, "--main_process_port", str(free_port())]], recipe, tmp_path / "run")
    last = RunFolder(path=tmp_path / "run").read_metrics()[-2]
    assert (last["step"], last["processes"]) == (4, processes)


def test_many_nodes_train_together(recipe: Path, tmp_path: Path) -> None:
    file = ["--config_file", str(ACCELERATE / "many-nodes.yaml"), "--num_machines", "2"]
    both = [*file, "--num_processes", "2", "--main_process_port", str(free_port())]
    launches = [[*both, "--machine_rank", str(rank)] for rank in range(2)]
    train(launches, recipe, tmp_path / "run")
    last = RunFolder(path=tmp_path / "run").read_metrics()[-2]
    assert (last["step"], last["processes"]) == (4, 2)
