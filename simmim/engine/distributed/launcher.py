"""Several processes on a CPU, when `accelerate launch` was asked for them.

accelerate leaves the processes of a CPU job to MPI: without it, `--num_processes 2 --cpu` starts
one process and drops the number unseen. Here the number is found again and torchrun starts them.
"""

import atexit
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from simmim.engine.exit_codes import LOST

RANK_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

PR_SET_PDEATHSIG = 1
"""Number of Linux's prctl option: the signal that a process gets when its parent is gone."""


def end_with_launcher() -> None:
    """Ask Linux for SIGTERM when the launcher of this process is gone.

    accelerate passes no signal on, and ranks outlive a torchrun that was killed: they would go on
    writing into the run folder, beside the run that resumes it.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))  # outlives an exec


def is_rank() -> bool:
    """Tell whether this process is one of several that a launcher has started."""
    return any(int(os.environ.get(name, "1")) > 1 for name in RANK_VARIABLES)


def run_as_rank(program: Callable[[], int]) -> NoReturn:
    """Run a program and end this process with the code that it returns; 1 where it raises.

    Python is not taken down. Threads of gloo outlive their group where anything refers to it, as
    the mesh of FSDP2 does, and a thread that needs Python while that ends aborts the process: a
    training that was through would count as failed. What was registered with atexit is run. A crash
    in native code tells where Python stood.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable()
    try:
        code = program()
    except Exception:  # its traceback is what Python would print
        traceback.print_exc()
        code = 1
    if code != LOST:  # process groups without one of their processes may not let go
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_processes() -> None:
    """Replace this process by torchrun where accelerate was asked for several CPU processes.

    Returns at once in every other case: one process, a GPU job, or a rank that some launcher has
    already started.

    Raises:
        ValueError: several machines were asked for, which needs torchrun itself.
    """
    number = requested_cpu_processes()
    if number < 2:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // number)), **os.environ}
    torchrun = [
        "-m",
        "simmim.engine.distributed.torchrun",
        "--standalone",
        "--nproc_per_node",
        str(number),
    ]
    arguments = [sys.executable, *torchrun, "-m", "simmim", *sys.argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, arguments, environment)  # noqa: S606 (no shell, our own arguments)


def requested_cpu_processes() -> int:
    """Return how many processes `accelerate launch` was asked for and did not start; 1 if none.

    Raises:
        ValueError: it was asked for more than one machine.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # accelerate launch always sets it
        return 1
    if any(name in os.environ for name in RANK_VARIABLES):
        return 1
    import torch  # noqa: PLC0415 (slow to import, and most commands end above)

    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if torch.accelerator.is_available() and not forced:
        return 1
    try:
        parent = psutil.Process().parent()
        arguments = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 1
    return processes_asked_for(arguments)


def processes_asked_for(arguments: list[str]) -> int:
    """Return the number of processes that an `accelerate launch` command line asks for.

    What the line leaves open stands in its config file, or in the one `accelerate config` wrote.

    Args:
        arguments: the command line of any process; 1 is the answer if it is another one.

    Raises:
        ValueError: it asks for more than one machine.
    """
    launch_arguments = _launch_arguments(arguments)
    if launch_arguments is None:
        return 1
    from accelerate.commands import config, launch  # noqa: PLC0415 (imports torch)

    asked = launch.launch_command_parser().parse_args(launch_arguments)
    processes, machines = asked.num_processes, asked.num_machines
    file = asked.config_file
    if file is None and not asked.cpu and Path(config.default_config_file).is_file():
        file = config.default_config_file
    if file is not None:
        defaults = config.load_config_from_file(file)
        processes = defaults.num_processes if processes is None else processes
        machines = defaults.num_machines if machines is None else machines
    if (machines or 1) > 1:
        raise ValueError(
            "accelerate launch cannot start CPU processes on several machines; start them with "
            "torchrun --nnodes … -m simmim …, which this command understands."
        )
    return max(1, processes or 1)


def _launch_arguments(arguments: list[str]) -> list[str] | None:
    """Return what follows `accelerate launch` in a command line; None if that is not in it."""
    # python itself comes first, perhaps with -m; what is launched comes later.
    for position, argument in enumerate(arguments[:4]):
        rest = arguments[position + 1 :]
        match argument.removesuffix(".py").replace("/", ".").split(".")[-3:]:
            case [*_, "accelerate-launch"] | ["accelerate", "commands", "launch"]:
                return rest
            case [*_, "simmim", "launch"]:  # ours around it
                return rest
            case [*_, "accelerate"] | ["accelerate", "commands", "accelerate_cli"]:
                return rest[1:] if rest[:1] == ["launch"] else None
    return None
