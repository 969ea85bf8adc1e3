"""torchrun that exits with the code of its ranks.

    python -m simmim.engine.distributed.torchrun …

torchrun itself exits with 1 whatever its ranks exit with, so a scheduler cannot distinguish a run
that stopped on request from one that failed. The options are torchrun's own.
`python -m simmim.launch` does the same for `accelerate launch`.
"""

# ruff: noqa: E402 (the system comes first: Windows lacks what the others import)
from data_prep.format.systems import require_posix

require_posix("simmim.engine.distributed.torchrun")
import os
import signal
import sys
from collections.abc import Callable, Sequence

from data_prep.format.terminal import protect_output
from simmim.engine.exit_codes import LOST, STOPPED
from simmim.stop_signals import exit_on_stop_signals, handled_stop_signals, ignore_stop_signals

DEFAULTS = {
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Settings of torchrun unless the environment or its options say otherwise: ranks have this many
seconds to write a checkpoint before they are killed. Slurm and Kubernetes have limits of their own,
which end earlier."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun and return the exit code of its ranks."""
    protect_output(optional=True)
    exit_on_stop_signals(STOPPED)
    from torch.distributed import run

    code = exit_code_of(lambda: run.main(arguments))
    ignore_stop_signals()
    return code


def exit_code_of(torchrun: Callable[[], object]) -> int:
    """Run torchrun in this process and return the exit code of its ranks.

    A stop signal to torchrun, which passes it on to the ranks, gives STOPPED.
    """
    # ruff: noqa: PLC0415 (importing torch takes seconds, in which signals have to be handled)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Slurm's warning is passed on; SIGHUP is not handled under nohup.
    handled = [number.name for number in (*handled_stop_signals(), signal.SIGQUIT)]
    for name, value in {**DEFAULTS, "PET_SIGNALS_TO_HANDLE": ",".join(handled)}.items():
        os.environ.setdefault(name, value)
    try:
        torchrun()
    except ChildFailedError as error:
        ignore_stop_signals()
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:
                name, process = signal.Signals(-failure.exitcode).name, failure.pid
                sys.stderr.write(f"simmim: rank {rank} (process {process}) was killed by {name}.\n")
        return common_exit_code([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        ignore_stop_signals()
        name = signal.Signals(error.sigval).name
        sys.stderr.write(f"simmim: the launcher received {name} and stopped its processes.\n")
        return STOPPED
    return 0


def common_exit_code(codes: Sequence[int]) -> int:
    """Return the exit code that explains how a job ended: the first that a rank chose itself.

    The other ranks notice that they lost a failed one, or are killed by a signal (a negative code),
    so LOST is returned only if there is no other code.
    """
    return next((code for code in codes if code > 0 and code != LOST), LOST)


if __name__ == "__main__":
    sys.exit(main())
