"""The environment of a process: its rank, and what launchers and accelerate were asked for.

The one module that reads or changes environment variables.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import psutil

WORLD_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
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

FSDP_VARIABLE = "ACCELERATE_USE_FSDP"

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


@dataclass(frozen=True, kw_only=True)
class ProcessEnvironment:
    """What the environment variables of a process say."""

    variables: Mapping[str, str]
    """All of them, as they were read."""

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return self._integer("RANK", 0)

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return self._integer("LOCAL_RANK", 0)

    @property
    def is_main(self) -> bool:
        """Whether this process is the first of all, which prints and writes for them."""
        return self.rank == 0

    @property
    def is_one_of_several(self) -> bool:
        """Whether a launcher started this process as one of several."""
        return any(self._integer(name, 1) > 1 for name in WORLD_VARIABLES)

    @property
    def restarts(self) -> int:
        """How often torchrun has started the processes again."""
        return self._integer("TORCHELASTIC_RESTART_COUNT", 0)

    @property
    def keeps_store(self) -> bool:
        """Whether torchrun's store outlives the processes that it starts."""
        return self.variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def launcher(self) -> Literal["accelerate", "torchrun"] | None:
        """What started this process, if it was a launcher."""
        if "TORCHELASTIC_RUN_ID" in self.variables:
            return "torchrun"
        return "accelerate" if self._asked_of_accelerate else None

    @property
    def shards_weights(self) -> bool:
        """Whether accelerate's config asks for FSDP."""
        return self._is_true(FSDP_VARIABLE)

    @property
    def reshards_after_forward(self) -> bool:
        """Whether FSDP frees the gathered weights of a block between forward and backward."""
        return self.variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"

    @cached_property
    def processes_to_start(self) -> int:
        """Processes that `accelerate launch` was asked for and did not start; 1 if none.

        accelerate leaves the processes of a CPU job to MPI: without it, `--num_processes 2 --cpu`
        silently starts one process.

        Raises:
            ValueError: more than one machine was asked for.
        """
        if not self._asked_of_accelerate or any(name in self.variables for name in WORLD_VARIABLES):
            return 1
        import torch  # noqa: PLC0415 (slow to import, and most commands end above)

        forced = self.variables.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        if torch.accelerator.is_available() and not forced:
            return 1
        try:
            parent = psutil.Process().parent()
            arguments = parent.cmdline() if parent is not None else []
        except psutil.Error:
            return 1
        return processes_in(arguments)

    @property
    def world(self) -> int:
        """Number of processes that train."""
        return max(self.processes_to_start, self._integer("WORLD_SIZE", 1))

    @property
    def local_world(self) -> int:
        """Number of processes that train on this machine."""
        return max(self.processes_to_start, self._integer("LOCAL_WORLD_SIZE", 1))

    @property
    def cache_folder(self) -> Path:
        """The user's folder of caches."""
        return Path(self.variables.get("XDG_CACHE_HOME") or "~/.cache").expanduser()

    def check_parallelism(self) -> None:
        """Check that accelerate's config asks for nothing that training does not support.

        Raises:
            ValueError: it asks for DeepSpeed, FSDP1, offloading or activation checkpointing.
        """
        if self._is_true("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError(NO_DEEPSPEED)
        if not self.shards_weights:
            return
        if self.variables.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "set fsdp_version to 2 in accelerate's config: FSDP1 is not supported."
            )
        for name, remedy in REFUSED.items():
            if self._is_true(name):
                raise ValueError(f"set {name.lower()} to false in accelerate's config: {remedy}")

    def without_launcher(self) -> dict[str, str]:
        """Return the variables without a launcher's, for a process outside the job."""
        return {
            name: value
            for name, value in self.variables.items()
            if not name.startswith(LAUNCHER_PREFIXES)
        }

    @property
    def _asked_of_accelerate(self) -> bool:
        return "ACCELERATE_MIXED_PRECISION" in self.variables  # accelerate launch always sets it

    def _integer(self, name: str, default: int) -> int:
        return int(self.variables.get(name, default))

    def _is_true(self, name: str) -> bool:
        return self.variables.get(name, "false").lower() == "true"


@cache
def process_environment() -> ProcessEnvironment:
    """Return the environment of this process, as it was when first asked for."""
    return ProcessEnvironment(variables=MappingProxyType(dict(os.environ)))


def print_on_main(text: str) -> None:
    """Write a line to stderr, once for all processes."""
    if process_environment().is_main:
        sys.stderr.write(f"{text}\n")


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set environment variables that are not set, for a library that reads them."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def restored_variables() -> Iterator[None]:
    """Undo what libraries change in the environment variables within this context."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def fsdp_hidden() -> Iterator[None]:
    """Hide FSDP from an Accelerator that is built within this context.

    Accelerate would shard in its own way: gradients averaged in bfloat16, and parameters identified
    by their address in memory, which empty shards do not have. It has no other switch: it reads the
    variable in its constructor and in that of its state.
    """
    requested = os.environ.pop(FSDP_VARIABLE, None)
    try:
        yield
    finally:
        if requested is not None:
            os.environ[FSDP_VARIABLE] = requested


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
