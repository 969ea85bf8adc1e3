"""Environment of the launcher: number of processes and cores, FSDP2 or DDP.

accelerate leaves the processes of a CPU job to MPI: without it, `--num_processes 2 --cpu` silently
starts one process. Here the requested number is recovered, so that torchrun can start them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

RANK_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which launchers give the number of processes."""

LAUNCHER_PREFIXES = (
    "ACCELERATE_",
    "FSDP_",
    "GROUP_",
    "LOCAL_",
    "MASTER_",
    "MPI_",
    "MV2_",
    "OMPI_",
    "PMI_",
    "RANK",
    "ROLE_",
    "TORCHELASTIC_",
    "WORLD_",
)

NO_DEEPSPEED = (
    "accelerate's config asks for DeepSpeed, which is not supported: use FSDP2, with "
    "jobs/accelerate/fsdp2.yaml. In place of ZeRO-1 and ZeRO-2 set fsdp_reshard_after_forward to "
    "false in it, in place of ZeRO-3 to true."
)

REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "use execution.checkpointing of the recipe.",
    "FSDP_OFFLOAD_PARAMS": "weights stay on the devices; more devices make the shards smaller.",
}
"""Settings of accelerate that would be ignored, each with its remedy."""


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment_without_launcher() -> dict[str, str]:
    """Return the environment without a launcher's variables, for a process outside the job."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)
    }


def is_rank() -> bool:
    """Return whether a launcher started this process as one of several."""
    return any(int(os.environ.get(name, "1")) > 1 for name in RANK_VARIABLES)


def fsdp_requested() -> bool:
    """Return whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def fsdp_hidden() -> Iterator[None]:
    """Hide FSDP from an Accelerator that is built within this context.

    Accelerate would shard in its own way: gradients averaged in bfloat16, and parameters identified
    by their address in memory, which empty shards do not have.
    """
    name = "ACCELERATE_USE_FSDP"
    requested = os.environ.pop(name, None)
    try:
        yield
    finally:
        if requested is not None:
            os.environ[name] = requested


def check_parallelism() -> None:
    """Check that accelerate's configuration asks for nothing that training does not support.

    Raises:
        ValueError: it asks for DeepSpeed, FSDP1, offloading or activation checkpointing.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(NO_DEEPSPEED)
    if not fsdp_requested():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("set fsdp_version to 2 in accelerate's config: FSDP1 is not supported.")
    for name, remedy in REFUSED.items():
        if os.environ.get(name, "").lower() == "true":
            raise ValueError(f"set {name.lower()} to false in accelerate's config: {remedy}")


def requested_cpu_processes() -> int:
    """Return how many processes `accelerate launch` was asked for and did not start; 1 if none.

    Raises:
        ValueError: more than one machine was asked for.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # accelerate launch always sets it
        return 1
    if any(name in os.environ for name in RANK_VARIABLES):
        return 1
    import torch  # noqa: PLC0415 (slow to import, and most commands end above)

    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if torch.accelerator.is_available() and not forced:
        return 1
    try:
        parent = psutil.Process().parent()
        arguments = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 1
    return processes_in(arguments)


def processes_in(command_line: list[str]) -> int:
    """Return the number of processes that an `accelerate launch` command line asks for.

    Options that are not given are taken from its config file, or from the default one that
    `accelerate config` wrote.

    Args:
        command_line: arguments of a process; the number is 1 if it is not `accelerate launch`.

    Raises:
        ValueError: the command line asks for more than one machine.
    """
    launch_arguments = _launch_arguments(command_line)
    if launch_arguments is None:
        return 1
    from accelerate.commands import config, launch  # noqa: PLC0415 (imports torch)

    asked = launch.launch_command_parser().parse_args(launch_arguments)
    processes, machines = asked.num_processes, asked.num_machines
    file = asked.config_file
    if file is None and not asked.cpu and Path(config.default_config_file).is_file():
        file = config.default_config_file
    if file is not None:
        defaults = config.load_config_from_file(file)
        processes = defaults.num_processes if processes is None else processes
        machines = defaults.num_machines if machines is None else machines
    if (machines or 1) > 1:
        raise ValueError(
            "accelerate launch cannot start CPU processes on several machines; start them with "
            "torchrun --nnodes … -m simmim …, which is supported."
        )
    return max(1, processes or 1)


def _launch_arguments(command_line: list[str]) -> list[str] | None:
    """Return the arguments of `accelerate launch` in a command line; None if it is another one."""
    # Python itself comes first, perhaps with options and -m; the launched program comes later.
    for position, argument in enumerate(command_line[:4]):
        rest = command_line[position + 1 :]
        match argument.removesuffix(".py").replace("/", ".").split(".")[-3:]:
            case [*_, "accelerate-launch"] | ["accelerate", "commands", "launch"]:
                return rest
            case [*_, "simmim", "launch"]:  # our wrapper
                return rest
            case [*_, "accelerate"] | ["accelerate", "commands", "accelerate_cli"]:
                return rest[1:] if rest[:1] == ["launch"] else None
    return None
