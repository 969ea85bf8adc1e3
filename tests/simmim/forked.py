"""Python programs in processes forked from one that has imported torch already.

The imports of a training take Python seconds, a fork takes milliseconds. The processes are real:
each has its own session, environment, output and signals. Tests of launchers, and of what happens
during the imports, start Python itself.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = (
    "torch._dynamo",  # imported by every optimizer
    "torch._subclasses.fake_tensor",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "accelerate",
    "simmim.bench.step",
    "simmim.tasks.pretrain.stage",
    "simmim.tasks.probe.online",
    "simmim.tasks.train",
    "simmim.tasks.segmentation.stage",
    "transformers.models.mask2former.modeling_mask2former",
    "transformers.models.rt_detr.modeling_rt_detr",
    "transformers.models.upernet.modeling_upernet",
)
"""Modules that are imported once, before the processes are forked; absent ones are skipped."""

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` with jobs/accelerate/fsdp2.yaml asks ranks for."""


class Job:
    """One process, or the ranks of a job; the methods are those of `subprocess.Popen`."""

    def __init__(self, processes: Sequence[ForkServerProcess]) -> None:
        self._processes = processes
        self.pids = [process.pid for process in processes if process.pid is not None]

    def poll(self) -> int | None:
        """Return None while any process runs, then the code of the first that failed, or 0."""
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"processes {self.pids}", timeout)
        return code

    def code_of(self, rank: int, timeout: float) -> int | None:
        """Wait for one rank, and return its code; None if it still runs."""
        self._processes[rank].join(timeout)
        return self._processes[rank].exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to each process, and to all that it started."""
        for process, pid in zip(self._processes, self.pids, strict=True):
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)

    def kill(self) -> None:
        """Kill the processes and all that they started."""
        for process, pid in zip(self._processes, self.pids, strict=True):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            process.kill()  # of a session or not
        self.wait(timeout=100)


@contextmanager
def forked(
    arguments: Sequence[str],
    log: Path,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Job]:
    """Run `python ARGUMENTS`: `-m MODULE …`, `-c CODE …` or `FILE …`; kill what is left at the end.

    Args:
        log: file that output and errors are appended to.
        ranks: number of processes; several are the ranks of one job.
        environment: variables besides those of this process and of ranks.
    """
    multiprocessing.set_forkserver_preload([*PRELOADED])
    context = multiprocessing.get_context("forkserver")
    job = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    if ranks > 1:
        job |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    method = multiprocessing.get_start_method()
    processes = [
        context.Process(
            target=_run,
            args=(list(arguments), log, job | (place if ranks > 1 else {}), method),
        )
        for place in places
    ]
    started: list[ForkServerProcess] = []
    log.touch()
    try:
        for process in processes:
            process.start()
            started.append(process)
        _wait_for_sessions(started)
        yield Job(started)
    finally:
        Job(started).kill()


WAITING = """
import time
from datetime import timedelta
import torch.distributed as dist
from simmim.engine.distributed.signals import StopRequest
from simmim.engine.distributed.watchdog import Watchdog

dist.init_process_group("gloo", timeout=timedelta(seconds=500))
with {guard}:
    dist.barrier()
    print(f"rank {{dist.get_rank()}} waits", flush=True)
    if dist.get_rank() == {late}:
        time.sleep(200)
    dist.barrier()
"""


@contextmanager
def waiting_ranks(guard: str, log: Path, *, late: int) -> Iterator[Job]:
    """Run two ranks, of which one waits in native code for the late one, within a guard."""
    with forked(["-c", WAITING.format(guard=guard, late=late)], log, ranks=2) as job:
        deadline = time.monotonic() + 100
        while log.read_text().count("waits") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        yield job


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for_sessions(processes: Sequence[ForkServerProcess]) -> None:
    """Wait until each process leads a session, so that signals reach all that it starts."""
    for process in processes:
        assert process.pid is not None
        with suppress(ProcessLookupError):
            while process.exitcode is None and os.getsid(process.pid) != process.pid:
                time.sleep(0.001)


def finish(
    arguments: Sequence[str],
    log: Path,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run one process, or so many ranks, to the end; return what they have printed."""
    before = log.stat().st_size if log.exists() else 0
    with forked(arguments, log, ranks, environment) as job:
        code = job.wait(timeout=400)
    text = log.read_bytes()[before:].decode()
    assert code == 0, text[-5000:]
    return text


def _run(arguments: list[str], log: Path, environment: Mapping[str, str], method: str) -> None:
    os.setsid()
    multiprocessing.set_start_method(method, force=True)  # for data workers, as without a fork
    os.environ.clear()
    os.environ.update(environment)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        file = os.open(path, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (multiprocessing closed it)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
