"""Start and end of the processes of a training."""

import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, NoReturn

from data_prep.format.terminal import ExitCode, flush_output
from simmim.compat import run_exit_functions
from simmim.engine.exit_codes import LOST
from simmim.environment import available_cores, process_environment
from simmim.stop_signals import STOP_SIGNALS

if TYPE_CHECKING:
    from accelerate import Accelerator

PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: the signal that a process gets when its parent ends."""

_groups = count()
"""Numbers of the process groups that this process has joined."""


def end_with_launcher() -> None:
    """Ask Linux for SIGTERM when the launcher of this process ends.

    accelerate passes no signal on, and ranks outlive a torchrun that was killed: they would keep
    writing into the run folder while another process resumes the run.
    """
    if process_environment().launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))  # outlives an exec


def start_processes() -> None:
    """Replace this process by torchrun if accelerate was asked for several CPU processes.

    Returns at once in every other case: one process, a GPU job, or a rank that a launcher has
    already started.

    Raises:
        ValueError: several machines were asked for, which requires torchrun itself.
    """
    number = process_environment().processes_to_start
    if number < 2:
        return
    variables = process_environment().variables
    environment = {"OMP_NUM_THREADS": str(max(1, available_cores() // number)), **variables}
    torchrun = [
        "-m",
        "simmim.launch",
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        str(number),
    ]
    arguments = [sys.executable, *torchrun, *_this_program()]
    sys.stdout.flush()
    sys.stderr.flush()
    # Received by torchrun once it handles them, see `exit_on_stop_signals`.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.execve(sys.executable, arguments, environment)  # noqa: S606 (no shell, our own arguments)


def _this_program() -> list[str]:
    """Return the program of this process and its arguments, as torchrun takes them."""
    spec = sys.modules["__main__"].__spec__  # of a module; a script has none
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    return sys.argv


def join_group(timeout: timedelta) -> None:
    """Initialise the process group if an earlier one has left keys in torchrun's store.

    That happens after torchrun has restarted the ranks, in torch 2.13, where its store outlives
    them, and in the second training of a program. The first rank to arrive would read stale
    addresses, so keys are prefixed with this start and this training. Otherwise this does nothing,
    and accelerate initialises the group.

    Args:
        timeout: the longest wait for another rank.
    """
    import torch  # noqa: PLC0415 (slow to import, and this file is part of every command)
    from torch.distributed.distributed_c10d import PrefixStore  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    environment = process_environment()
    if not environment.keeps_store or torch.distributed.is_initialized():
        return
    number = next(_groups)  # the same on all ranks
    if not environment.restarts and not number:
        return
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    torch.distributed.init_process_group(
        store=PrefixStore(f"restart-{environment.restarts}/training-{number}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )


def run_as_rank(program: Callable[[], int]) -> NoReturn:
    """Run a program and exit with the code it returns, or with 1 if it raises.

    The interpreter is not finalised. Threads of gloo outlive their process group as long as
    anything refers to it, such as the mesh of FSDP2, and a thread that needs Python during
    finalisation aborts the process: a finished training would count as failed. Functions registered
    with atexit are run. A crash in native code prints the Python stack.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable()
    code: ExitCode
    try:
        code = program()
    except SystemExit as ending:  # a mistake in the arguments
        code = ending.code
    except Exception:  # its traceback is what Python would print
        traceback.print_exc()
        code = 1
    if code != LOST:  # process groups that have lost a process may hang
        run_exit_functions()
    code = flush_output(code)
    os._exit(code if isinstance(code, int) else int(code is not None))


def end_processes(accelerator: "Accelerator") -> None:
    """Destroy the process group; all ranks call this together.

    They wait for each other first, so that none ends while another still reads what it sent.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()
