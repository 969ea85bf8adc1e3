"""`accelerate launch` for jobs that nobody watches: it can be told to stop, and says how it ended.

    python -m simmim.launch --config_file jobs/accelerate/one-node.yaml -m simmim pretrain …

The arguments are those of `accelerate launch`, which does the work. By itself that ends with 1
whatever its processes ended with, so that a scheduler cannot tell a stop on request from a mistake,
and it dies of the warning that Slurm sends before the time is up, while its processes still write
their checkpoint.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOPPED = 75
"""Exit code after a stop on request: EX_TEMPFAIL, "try again later"."""

LOST = 76
"""Exit code where a process did not end by itself: memory ran out, or a machine went away."""

SECONDS_TO_STOP = 600
"""What torchrun leaves its processes for a last checkpoint, where the environment says nothing.
Slurm and Kubernetes set a limit of their own, which ends earlier."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(argv: Sequence[str] | None = None) -> int:
    """Launch what `argv` asks for and return its exit code; 75 where a signal asked it to stop."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    arguments = launch_command_parser().parse_args(argv)
    relay = StopRelay()
    for number in STOP_SIGNALS:
        signal.signal(number, relay)
    try:
        launch_command(arguments)
    except SignalException:  # torchrun takes SIGTERM and SIGINT itself, and passes them on
        return STOPPED
    except ChildFailedError as error:
        code = first_code([failure.exitcode for failure in error.failures.values()])
    except subprocess.CalledProcessError as error:
        code = first_code([error.returncode])
    else:
        return 0
    return STOPPED if relay.asked else code


class StopRelay:
    """A signal handler that asks the launched processes to stop, however it was asked itself."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Pass SIGTERM on, or end at once if nothing was launched yet."""
        self.asked = True
        launched = psutil.Process().children()
        if not launched:
            sys.exit(STOPPED)
        for process in launched:
            process.terminate()


def first_code(codes: Sequence[int]) -> int:
    """Return the exit code that tells what happened: the first that a process chose itself.

    A process that a signal ended has a negative code. torchrun ends those beside a failed one in
    that way, so they tell something only where there is no other code.
    """
    return next((code for code in codes if code > 0), LOST)


if __name__ == "__main__":
    sys.exit(main())
