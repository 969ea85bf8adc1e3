"""First step of every command, before anything heavy is imported."""

from collections.abc import Sequence

from data_prep.format.terminal import protect_output
from simmim.engine.exit_codes import STOPPED
from simmim.stop_signals import exit_on_stop_signals

TRAINING = ("quickstart", "pretrain", "finetune", "labels")
"""Commands that train: they go on without a terminal, and stop signals end them with STOPPED."""

HELP = {"-h", "--help", "--help-fields", "--version"}
"""Options with which no command trains."""


def start_process(argv: Sequence[str]) -> None:
    """Prepare this process for a command: standard streams and stop signals.

    Args:
        argv: the command and its arguments.
    """
    trains = bool(argv) and argv[0] in TRAINING and not HELP & set(argv)
    protect_output(optional=trains)
    if trains:
        exit_on_stop_signals(STOPPED)
