"""torchrun that exits with the code of its ranks.

    python -m simmim.engine.distributed.torchrun …

torchrun itself ends with 1 whatever its ranks end with, so that a scheduler cannot tell a run that
stopped on request from one that failed. The options are torchrun's own. `python -m simmim.launch`
does the same for `accelerate launch`.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from simmim.engine.exit_codes import LOST, STOPPED

DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""What torchrun is told unless the environment or its options say otherwise: hand on Slurm's
warning, and grant ranks these seconds to write a checkpoint before they are killed. Slurm and
Kubernetes have limits of their own, which end earlier."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun and return the code of its ranks."""
    return code_of(lambda: run.main(arguments))


def code_of(torchrun: Callable[[], object]) -> int:
    """Return what the ranks of a torchrun in this process end with.

    A stop signal to torchrun, which it hands on to the ranks, counts as STOPPED.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        torchrun()
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:
                name, process = signal.Signals(-failure.exitcode).name, failure.pid
                sys.stderr.write(f"simmim: rank {rank} (process {process}) was killed by {name}.\n")
        return telling_code([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        sys.stderr.write(f"simmim: the launcher got {name} and has stopped its processes.\n")
        return STOPPED
    return 0


def telling_code(codes: Sequence[int]) -> int:
    """Return the exit code that tells what happened: the first that a process chose itself.

    Ranks beside a failed one notice that they lost it, or are ended by a signal (a negative code):
    LOST is left where there is no other reason.
    """
    return next((code for code in codes if code > 0 and code != LOST), LOST)


if __name__ == "__main__":
    sys.exit(main())
