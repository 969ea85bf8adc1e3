"""Training outlives its terminal; other commands end quietly. Stop signals before training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import simmim.cli
from simmim.engine.run import RunFolder
from simmim.stop_signals import STOP_SIGNALS, StopRelay

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "simmim.launch", "torchrun", "--standalone", "--nproc_per_node", "2"]
LAUNCH = ["-m", "simmim.launch", "--num_machines", "1", "--num_processes", "1", "--cpu"]
PRETRAIN = ["-m", "simmim", "pretrain"]
SLOW_START = """
import sys, time
from pathlib import Path
from simmim.start import start_process
start_process(sys.argv[1:])
from simmim.tasks.pretrain.stage import PretrainStage

def build(*arguments):
    Path("building").touch()
    time.sleep(100)

PretrainStage.__init__ = build
from simmim.cli import run
run()
"""


def shell(script: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `script` under bash, in which `"$@"` is Python with these arguments."""
    return subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        ('"$@" 2>&1 | true; exit "${PIPESTATUS[0]}"', []),
        ('"$@" <&- >&- 2>&-', []),
        pytest.param('"$@" >/dev/full 2>/dev/full', [], marks=pytest.mark.slow),
        pytest.param('"$@" <&- >&- 2>&-', TORCHRUN, marks=pytest.mark.slow),
        pytest.param('"$@" 2>&1 | true; exit "${PIPESTATUS[0]}"', LAUNCH, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_without_a_terminal(
    pretrain_config: Path, tmp_path: Path, script: str, launcher: list[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--config", str(pretrain_config), "--folder", str(run), "--training.steps", "4"]
    done = shell(script, [*launcher, *PRETRAIN, *arguments, "--data.workers", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert RunFolder(path=run).read_metrics()[-1]["step"] == 4
    assert (run / "encoder" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "simmim", "pretrain"],
        ["-m", "simmim", "finetune", "--help"],
        ["-m", "data_prep", "shard", "--help"],
        ["-m", "data_prep", "verify", "nowhere"],
    ],
)
def test_other_output_that_nobody_reads_ends_quietly(arguments: list[str], tmp_path: Path) -> None:
    # The reader has ended before the program begins; what Python itself reports goes to `said`.
    script = 'exec 3>&1 1> >(exec true); sleep 0.2; "$@" 2>said; echo "code $?" >&3; cat said >&2'
    done = shell(script, arguments, tmp_path)
    assert done.stdout.strip() in ("code 141", "code 2")  # mistakes are told on stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def handles(process: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal."""
    with suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


def stopped(
    arguments: list[str], number: signal.Signals, folder: Path, ready: Callable[[int], bool]
) -> tuple[int, str]:
    """Send a signal to a command once it is ready; return its exit code and output."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not ready(process.pid) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        return process.wait(timeout=60), process.communicate()[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ([], signal.SIGINT),
        ([], signal.SIGTERM),
        ([], signal.SIGHUP),
        (TORCHRUN, signal.SIGTERM),
        (LAUNCH, signal.SIGINT),
    ],
)
def test_a_signal_during_imports_ends_with_75(
    pretrain_config: Path, tmp_path: Path, launcher: list[str], number: signal.Signals
) -> None:
    command = [*launcher, *PRETRAIN, "--config", str(pretrain_config), "--folder", "run"]
    code, output = stopped(command, number, tmp_path, lambda pid: handles(pid, signal.SIGHUP))
    assert code == 75, output
    assert "Traceback" not in output
    assert number.name in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in STOP_SIGNALS[1:])],
)
def test_a_signal_while_data_and_model_are_built_ends_with_75(
    pretrain_config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = ["-c", SLOW_START, "pretrain", "--config", str(pretrain_config), "--folder", "run"]
    building = tmp_path / "building"
    code, output = stopped(command, number, tmp_path, lambda _pid: building.exists())
    assert code == 75, output
    assert "Traceback" not in output
    assert number.name in output


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(60)
"""


WHILE_IMPORTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Finder())
sys.argv = ["simmim", "{command}", "x", "y"]
from simmim.__main__ import main
main()
"""


def test_a_signal_while_its_handler_is_prepared_ends_with_75(tmp_path: Path) -> None:
    program = WHILE_IMPORTING.format(module="psutil._common", signal="SIGTERM", command="pretrain")
    done = shell('"$@"', ["-c", program], tmp_path)
    assert done.returncode == 75, done.stderr
    assert "SIGTERM outside of training" in done.stderr


@pytest.mark.parametrize("module", ["simmim.cli", "simmim.export.cli"])
def test_an_interrupt_while_a_command_is_imported_has_no_traceback(
    tmp_path: Path, module: str
) -> None:
    program = WHILE_IMPORTING.format(module=module, signal="SIGINT", command="export")
    done = shell('"$@"', ["-c", program], tmp_path)
    assert (done.returncode, done.stderr) == (130, "simmim: interrupted\n")


AT_THE_VERY_END = """
import os, signal, sys
class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)  # while Python ends, with the default actions of signals
sys.late = Late()
"""
ENDED_PROGRAMS = {
    "command": """
import simmim.cli
simmim.cli.main = lambda **_: 75
sys.argv = ["simmim", "pretrain"]
simmim.cli.run()
""",
    "torchrun": """
from simmim.launch import exit_code_of
from torch.distributed.elastic.multiprocessing.api import SignalException
def stopped():
    signal.signal(signal.SIGINT, lambda *_: None)  # as torchrun handles it
    raise SignalException("", signal.SIGTERM)
sys.exit(exit_code_of(stopped))
""",
}


@pytest.mark.parametrize("program", ENDED_PROGRAMS)
def test_a_signal_while_python_ends_changes_no_exit_code(program: str, tmp_path: Path) -> None:
    done = shell('"$@"', ["-c", AT_THE_VERY_END + ENDED_PROGRAMS[program]], tmp_path)
    assert done.returncode == 75, done.stderr


def test_a_relay_passes_stop_signals_on_and_waits() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with StopRelay() as relay:
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert not relay.asked
        os.kill(os.getpid(), signal.SIGHUP)
        assert child.wait(timeout=30) == 7
        child.stdout.close()
        assert relay.asked
    assert signal.getsignal(signal.SIGHUP) == before


def test_labels_end_with_75_when_a_run_was_stopped(
    classification_values: dict[str, Any],
    encoder_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(classification_values))
    ended = subprocess.CompletedProcess([], 75)
    monkeypatch.setattr("simmim.tasks.label_efficiency.subprocess.run", lambda *_, **__: ended)
    command = ["labels", "--config", str(config), "--init", str(encoder_directory)]
    command += ["--folder", str(tmp_path / "all")]
    assert simmim.cli.main(command) == 75
    assert "same command" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("options", ["ro", "size=4k", "size=64k"])
def test_training_does_without_shared_memory(
    pretrain_config: Path, tmp_path: Path, options: str
) -> None:
    mounted = f"mount -t tmpfs -o {options} tmpfs /dev/shm && "
    allowed = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mounted} true"], capture_output=True, check=False
    )
    if allowed.returncode:
        pytest.skip("mounting is not permitted")
    run = tmp_path / "run"
    arguments = ["--config", str(pretrain_config), "--folder", str(run), "--training.steps", "4"]
    script = f'exec unshare -m bash -c \'{mounted} "$@"\' bash "$@"'
    done = shell(script, [*PRETRAIN, *arguments, "--data.workers", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "/dev/shm" in done.stderr
    assert "Traceback" not in done.stderr
    assert RunFolder(path=run).read_metrics()[-1]["step"] == 4
