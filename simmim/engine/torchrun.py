"""torchrun, which ends with the exit code of its ranks: `python -m simmim.engine.torchrun …`.

torchrun itself ends with 1 whatever its ranks end with, so that a scheduler cannot tell a run that
stopped on request from one that failed. The options are torchrun's own. accelerate launch ends with
1, too; on a CPU, where it starts no torchrun, a signal to it alone ends it at once, with 128 plus
the signal's number, and the ranks write their checkpoint after that.
"""

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from simmim.engine.signals import STOPPED
from simmim.engine.watchdog import LOST

DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
}
"""What torchrun is told unless the environment or its options say otherwise: hand on Slurm's
warning, and grant ranks these seconds to write a checkpoint before they are killed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun and return the code of the rank that failed first, LOST if it was killed.

    A stop signal to torchrun, which it hands on to the ranks, counts as STOPPED.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        sys.stderr.write(f"simmim: rank {rank} (process {failure.pid}) was killed by {name}.\n")
        return LOST
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        sys.stderr.write(f"simmim: torchrun got {name} and has stopped its processes.\n")
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
