"""`accelerate launch` for unattended jobs: it passes on stop signals and exit codes.

    python -m simmim.launch --config_file jobs/accelerate/one-node.yaml -m simmim pretrain …

The arguments are those of `accelerate launch`, which does the work. On its own it exits with 1
whatever the exit codes of its processes, so a scheduler cannot distinguish a stop on request from a
failure, and the warning that Slurm sends before the time limit kills it while its processes still
write their checkpoint.
"""

# ruff: noqa: E402 (the system comes first: Windows lacks what the others import)
from data_prep.format.systems import require_posix

require_posix("simmim.launch")
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from data_prep.format.terminal import protect_output
from simmim.engine.distributed.environment import NO_DEEPSPEED
from simmim.engine.distributed.torchrun import common_exit_code, exit_code_of
from simmim.engine.exit_codes import STOPPED
from simmim.stop_signals import StopRelay, exit_on_stop_signals, ignore_stop_signals

# ruff: noqa: PLC0415 (importing accelerate takes seconds, in which signals have to be handled)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accelerate launch` and return the exit code of its processes, 75 after a stop signal."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(argv)
    if _asks_for_deepspeed(arguments):  # refused here: accelerate ends with a traceback
        sys.stderr.write(f"simmim: {NO_DEEPSPEED}\n")
        return 2
    # If accelerate runs torchrun, torchrun's own handler replaces this one.
    with StopRelay(without_children=lambda: os._exit(STOPPED)) as relay:
        try:
            code = exit_code_of(lambda: launch_command(arguments))  # several processes: torchrun
        except subprocess.CalledProcessError as error:  # one process, started by accelerate
            code = common_exit_code([error.returncode])
    return STOPPED if code and relay.asked else code


def _asks_for_deepspeed(arguments: Namespace) -> bool:
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.utils import DistributedType

    file = arguments.config_file
    if file is None and Path(default_config_file).is_file():
        file = default_config_file
    if arguments.use_deepspeed or file is None:
        return bool(arguments.use_deepspeed)
    return bool(load_config_from_file(file).distributed_type == DistributedType.DEEPSPEED)


if __name__ == "__main__":
    protect_output(optional=True)
    exit_on_stop_signals(STOPPED)
    code = main()
    ignore_stop_signals()
    sys.exit(code)
