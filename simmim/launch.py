"""`accelerate launch` and `torchrun` for unattended jobs: they pass on stop signals and exit codes.

    python -m simmim.launch --config_file jobs/accelerate/one-node.yaml -m simmim pretrain …
    python -m simmim.launch torchrun --standalone --nproc_per_node 2 -m simmim pretrain …

The arguments are those of `accelerate launch`, or after `torchrun` those of torchrun, which do the
work. On their own they exit with 1 whatever the exit codes of their processes, so a scheduler
cannot distinguish a stop on request from a failure, and the warning that Slurm sends before the
time limit kills accelerate while its processes still write their checkpoint.
"""

# ruff: noqa: E402 (the system comes first: Windows lacks what the others import)
from data_prep.format.systems import require_posix

require_posix("simmim.launch")
import os
import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from data_prep.format.terminal import protect_output
from simmim.engine.exit_codes import BAD_INPUT, LOST, STOPPED
from simmim.environment import NO_DEEPSPEED, set_defaults
from simmim.stop_signals import (
    StopRelay,
    exit_on_stop_signals,
    handled_stop_signals,
    ignore_stop_signals,
)

# ruff: noqa: PLC0415 (importing torch takes seconds, in which signals have to be handled)

TORCHRUN_DEFAULTS = {
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Settings of torchrun unless the environment or its options say otherwise: ranks have this many
seconds to write a checkpoint before they are killed. Slurm and Kubernetes have limits of their own,
which end earlier."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start processes and return their common exit code, 75 after a stop signal.

    Args:
        argv: arguments of `accelerate launch`, or `torchrun` and its arguments; None takes those of
            this process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["torchrun"]:
        return launch_torchrun(argv[1:])
    return launch_accelerate(argv)


def launch_torchrun(arguments: list[str]) -> int:
    """Run torchrun in this process and return the exit code of its ranks."""
    from torch.distributed import run

    name = "python -m simmim.launch torchrun"
    asked = parse_options(run.get_args_parser(), name, "torchrun", arguments)
    try:
        run.config_from_args(asked)
    except (AssertionError, ValueError) as error:  # a value that cannot be; torchrun has it raised
        sys.stderr.write(f"{name}: {error}. See {name} --help.\n")
        return BAD_INPUT
    return exit_code_of(lambda: run.main(arguments))


def launch_accelerate(argv: list[str]) -> int:
    """Run `accelerate launch` in this process and return the exit code of its processes."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    name = "python -m simmim.launch"
    arguments = parse_options(launch_command_parser(), name, "accelerate launch", argv)
    if _asks_for_deepspeed(arguments):  # refused here: accelerate ends with a traceback
        sys.stderr.write(f"simmim: {NO_DEEPSPEED}\n")
        return BAD_INPUT
    # If accelerate runs torchrun, torchrun's own handler replaces this one.
    with StopRelay(without_children=lambda: os._exit(STOPPED)) as relay:
        try:
            code = exit_code_of(lambda: launch_command(arguments))  # several processes: torchrun
        except subprocess.CalledProcessError as error:  # one process, started by accelerate
            code = common_exit_code([error.returncode])
    return STOPPED if code and relay.asked else code


def parse_options(
    parser: ArgumentParser, name: str, launcher: str, arguments: Sequence[str]
) -> Namespace:
    """Parse the arguments of a launcher; a mistake in them is one line, without its long usage.

    Args:
        parser: the parser of the launcher.
        name: what was called in its place.
        launcher: its name.
        arguments: its arguments.
    """

    def refuse(message: str) -> NoReturn:
        parser.exit(BAD_INPUT, f"{name}: {message}. See {name} --help.\n")

    parser.prog = name
    parser.usage = f"%(prog)s [options of {launcher}] -m simmim COMMAND ..."
    parser.error = refuse  # type: ignore[method-assign] # argparse knows no other way
    return parser.parse_args(arguments)


def exit_code_of(torchrun: Callable[[], object]) -> int:
    """Run torchrun in this process and return the exit code of its ranks.

    A stop signal to torchrun, which passes it on to the ranks, gives STOPPED.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Slurm's warning is passed on; SIGHUP is not handled under nohup.
    handled = [number.name for number in (*handled_stop_signals(), signal.SIGQUIT)]
    set_defaults({**TORCHRUN_DEFAULTS, "PET_SIGNALS_TO_HANDLE": ",".join(handled)})
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
