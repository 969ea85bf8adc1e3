"""`accelerate launch` for jobs that nobody watches: it can be told to stop, and says how it ended.

    python -m simmim.launch --config_file jobs/accelerate/one-node.yaml -m simmim pretrain …

The arguments are those of `accelerate launch`, which does the work. By itself that ends with 1
whatever its processes ended with, so that a scheduler cannot tell a stop on request from a mistake,
and it dies of the warning that Slurm sends before the time is up, while its processes still write
their checkpoint.
"""

import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType

from simmim.data.loader.workers import STOP_SIGNALS
from simmim.engine.distributed.parallelism import NO_DEEPSPEED
from simmim.engine.distributed.torchrun import code_of, telling_code
from simmim.engine.exit_codes import STOPPED


def main(argv: Sequence[str] | None = None) -> int:
    """Launch what `argv` asks for and return its exit code; 75 where a signal asked it to stop."""
    arguments = launch_command_parser().parse_args(argv)
    if _asks_for_deepspeed(arguments):  # refused here: accelerate ends with a traceback
        sys.stderr.write(f"simmim: {NO_DEEPSPEED}\n")
        return 2
    relay = StopRelay()
    for number in STOP_SIGNALS:
        signal.signal(number, relay)
    try:
        code = code_of(lambda: launch_command(arguments))  # torchrun, for several processes
    except subprocess.CalledProcessError as error:  # or a process of accelerate's
        code = telling_code([error.returncode])
    return STOPPED if code and relay.asked else code


def _asks_for_deepspeed(arguments: Namespace) -> bool:
    file = arguments.config_file
    if file is None and Path(default_config_file).is_file():
        file = default_config_file
    if arguments.use_deepspeed or file is None:
        return bool(arguments.use_deepspeed)
    return bool(load_config_from_file(file).distributed_type == DistributedType.DEEPSPEED)


class StopRelay:
    """A signal handler that asks the launched processes to stop, however it was asked itself.

    torchrun, where accelerate runs it, puts its own in this one's place.
    """

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


if __name__ == "__main__":
    sys.exit(main())
