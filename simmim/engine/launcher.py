"""Several processes on a CPU, when `accelerate launch` was asked for them.

accelerate leaves the processes of a CPU job to MPI: without it, `--num_processes 2 --cpu` starts
one process and drops the number unseen. Here the number is found again and torchrun starts them.
"""

import os
import sys
from pathlib import Path

import psutil
import torch
import yaml

RANK_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


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
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    arguments = [sys.executable, *torchrun, "-m", "simmim", *sys.argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, arguments, environment)  # noqa: S606 (no shell, our own arguments)


def requested_cpu_processes() -> int:
    """Return how many processes `accelerate launch` was asked for and did not start; 1 if none."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or torch.accelerator.is_available():
        return 1
    if any(name in os.environ for name in RANK_VARIABLES):
        return 1
    parent = psutil.Process().parent()
    arguments = parent.cmdline() if parent is not None else []
    if "launch" not in arguments and not any("accelerate" in part for part in arguments[:3]):
        return 1
    return processes_asked_for(arguments)


def processes_asked_for(arguments: list[str]) -> int:
    """Return `num_processes` of an `accelerate launch` command line or its config file.

    Raises:
        ValueError: it asks for more than one machine.
    """
    ours = arguments.index("simmim") if "simmim" in arguments else len(arguments)
    options = _options(arguments[:ours])
    if "config_file" in options:
        try:
            values = yaml.safe_load(Path(options["config_file"]).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            values = None
        if isinstance(values, dict):
            options = {key: str(value) for key, value in values.items()} | options
    if int(options.get("num_machines", "1")) > 1:
        raise ValueError(
            "accelerate launch cannot start CPU processes on several machines; start them with "
            "torchrun --nnodes … -m simmim …, which this command understands."
        )
    return int(options.get("num_processes", "1"))


def _options(arguments: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, separator, value = argument[2:].partition("=")
        if not separator and position + 1 < len(arguments):
            value = arguments[position + 1]
        options[name.replace("-", "_")] = value
    return options
