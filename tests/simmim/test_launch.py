"""`python -m simmim.launch` passes on exit codes and stop signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from simmim.launch import common_exit_code, main

EITHER = pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])

# Notes its process when it is ready to be stopped; ends with the code it is given otherwise.
PROGRAM = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1], os.environ.get("RANK", "0")).touch()
if sys.argv[2] == "wait":
    time.sleep(120)
sys.exit(int(sys.argv[2]))
"""


def options(processes: int) -> list[str]:
    """Return options for accelerate to start this many processes, itself or through torchrun."""
    if processes == 1:
        return ["--num_processes", "1", "--num_machines", "1", "--cpu"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    return [*several, "--main_process_port", port]


@contextmanager
def launched(folder: Path, processes: int, ending: str) -> Iterator["subprocess.Popen[bytes]"]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    ready = folder / "ready"
    ready.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "simmim.launch", *options(processes), str(program), ready, ending],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@EITHER
def test_the_exit_code_of_the_run_is_returned(processes: int, tmp_path: Path) -> None:
    with launched(tmp_path, processes, "2") as process:
        assert process.wait(timeout=150) == 2


@EITHER
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signals_are_passed_on(processes: int, number: signal.Signals, tmp_path: Path) -> None:
    with launched(tmp_path, processes, "wait") as process:
        deadline = time.monotonic() + 100
        while len(list((tmp_path / "ready").iterdir())) < processes:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=100) == 75


@pytest.mark.parametrize("launcher", [[], ["torchrun"]], ids=["accelerate", "torchrun"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: training_script"),
        (["--foo", "-m", "simmim", "pretrain"], "--foo"),
    ],
    ids=["no program", "an unknown option"],
)
def test_a_mistake_in_the_options_is_one_line(
    launcher: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main([*launcher, *arguments])
    assert ending.value.code == 2
    (mistake,) = capsys.readouterr().err.splitlines()
    name = " ".join(["python -m simmim.launch", *launcher])
    assert mistake.startswith(f"{name}: ")
    assert message in mistake
    assert mistake.endswith(f" See {name} --help.")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--nproc-per-node", "many"), ("--nnodes", "0"), ("--nnodes", "x"), ("--max-restarts", "-1")],
)
def test_a_value_that_torchrun_cannot_take_is_one_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["torchrun", option, value, "-m", "simmim", "pretrain"]) == 2
    (mistake,) = capsys.readouterr().err.splitlines()
    assert mistake.endswith(" See python -m simmim.launch torchrun --help.")


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([75, 75], 75),
        ([2, -15], 2),
        ([-15, 2], 2),
        ([76, 2], 2),
        ([-9], 76),
        ([76, -9], 76),
        ([1], 1),
    ],
)
def test_the_most_informative_exit_code_is_taken(codes: list[int], code: int) -> None:
    assert common_exit_code(codes) == code


def test_deepspeed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "zero.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n")
    for asked in (["--config_file", str(config)], ["--use_deepspeed"]):
        assert main([*asked, "-m", "simmim", "pretrain"]) == 2
        assert "jobs/accelerate/fsdp2.yaml" in capsys.readouterr().err
