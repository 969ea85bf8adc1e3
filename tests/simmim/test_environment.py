"""What launchers ask for: number of processes, FSDP2, and settings that are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import config

from simmim.environment import (
    WORLD_VARIABLES,
    ProcessEnvironment,
    fsdp_hidden,
    process_environment,
    processes_in,
    restored_variables,
    set_defaults,
)

SIMMIM = ["-m", "simmim", "pretrain", "--config", "jobs/pretrain/cifar10.yaml"]
LAUNCHERS = {
    "console script": ["/venv/bin/python3", "/venv/bin/accelerate", "launch"],
    "console script of launch": ["/venv/bin/python3", "/venv/bin/accelerate-launch"],
    "module": ["python", "-m", "accelerate.commands.launch"],
    "module of all commands": [
        "python",
        "-u",
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
    ],
    "file": ["python", "/venv/site-packages/accelerate/commands/launch.py"],
    "binary": ["accelerate", "launch"],
}
LAUNCH = LAUNCHERS["console script"]


@pytest.fixture(autouse=True)
def default_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `accelerate config` would write; this machine may have such a file."""
    path = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config, "default_config_file", str(path))
    return path


def write(path: Path, **values: object) -> Path:
    common = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO"}
    path.write_text(yaml.safe_dump(common | values))
    return path


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (["--num_processes", "2", "--cpu"], 2),
        (["--num-processes", "3", "--cpu"], 3),
        (["--cpu", "--num_processes=4", "--num_machines", "1"], 4),
        (["--num_processes", "2", "--main_process_port", "29501", "--quiet"], 2),
        (["--num_processes", "1", "--cpu"], 1),
        (["--num_processes", "0"], 1),
        (["--cpu"], 1),
        ([], 1),
    ],
)
def test_the_number_of_processes_is_read_from_the_command_line(
    launcher: str, options: list[str], processes: int
) -> None:
    assert processes_in([*LAUNCHERS[launcher], *options, *SIMMIM]) == processes


@pytest.mark.parametrize(
    "launched", [SIMMIM, ["--module", *SIMMIM[1:]], ["/venv/bin/simmim", *SIMMIM[2:]]]
)
def test_options_of_the_launched_program_are_ignored(launched: list[str], tmp_path: Path) -> None:
    ours = ["--num_processes", "9", "--num_machines", "9", "--config_file", str(tmp_path / "none")]
    assert processes_in([*LAUNCH, "--num_processes", "2", *launched, *ours]) == 2
    assert processes_in([*LAUNCH, *launched, *ours]) == 1


def test_an_option_may_hold_our_name(tmp_path: Path) -> None:
    file = write(tmp_path / "simmim", num_processes=2)
    options = ["--config_file", str(file), "--num_processes", "3"]
    assert processes_in([*LAUNCH, *options, *SIMMIM]) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bash"],
        ["/usr/bin/make", "launch", "--num_processes", "4"],
        ["python", "tools/launch.py", "--num_processes", "4"],
        ["python", "/home/accelerate/train.py", "launch", "--num_processes", "4"],
        ["python", "/venv/bin/accelerate", "test", "--num_processes", "4"],
        ["pytest", "-k", "accelerate", "--num_processes", "4"],
    ],
)
def test_other_parent_processes_request_one_process(arguments: list[str]) -> None:
    assert processes_in(arguments) == 1


def test_a_config_file_supplies_missing_options(tmp_path: Path) -> None:
    file = write(tmp_path / "cpu.yaml", num_processes=3, num_machines=1, use_cpu=True)
    line = [*LAUNCH, "--config_file", str(file)]
    assert processes_in([*line, *SIMMIM]) == 3
    assert processes_in([*line, "--cpu", *SIMMIM]) == 3
    assert processes_in([*line, "--num_processes", "2", *SIMMIM]) == 2


def test_a_config_file_without_a_number_means_one_process(tmp_path: Path) -> None:
    file = write(tmp_path / "cpu.yaml")
    assert processes_in([*LAUNCH, "--config_file", str(file), *SIMMIM]) == 1


def test_the_default_config_counts_where_accelerate_reads_it(
    default_config: Path, tmp_path: Path
) -> None:
    write(default_config, num_processes=4, use_cpu=True)
    assert processes_in([*LAUNCH, *SIMMIM]) == 4
    assert processes_in([*LAUNCH, "--num_processes", "2", *SIMMIM]) == 2
    assert processes_in([*LAUNCH, "--cpu", *SIMMIM]) == 1  # accelerate passes it over
    other = write(tmp_path / "other.yaml", num_processes=3)
    assert processes_in([*LAUNCH, "--config_file", str(other), *SIMMIM]) == 3


def test_several_machines_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchrun --nnodes"):
        processes_in([*LAUNCH, "--num_machines", "2", "--num_processes", "4", *SIMMIM])
    file = write(tmp_path / "cpu.yaml", num_processes=4, num_machines=2)
    with pytest.raises(ValueError, match="torchrun --nnodes"):
        processes_in([*LAUNCH, "--config_file", str(file), *SIMMIM])


def test_a_process_without_a_launcher_starts_no_others() -> None:
    alone = ProcessEnvironment(variables={})
    assert (alone.processes_to_start, alone.world, alone.local_world) == (1, 1, 1)
    assert (alone.rank, alone.local_rank, alone.restarts) == (0, 0, 0)
    assert alone.is_main
    assert alone.launcher is None
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
    environment = ProcessEnvironment(variables=launched)
    assert environment.launcher == "accelerate"
    assert environment.processes_to_start == 1  # the parent is whoever runs the tests


def test_a_rank_of_torchrun_knows_its_place() -> None:
    variables = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
    }
    rank = ProcessEnvironment(variables=variables)
    assert (rank.rank, rank.local_rank, rank.world, rank.local_world) == (5, 1, 8, 4)
    assert rank.launcher == "torchrun"
    assert rank.restarts == 2
    assert rank.keeps_store
    assert not rank.is_main
    assert rank.without_launcher() == {}


def test_the_number_of_processes_is_read_from_the_parent(tmp_path: Path) -> None:
    """The parent is a real process with accelerate's command line; asking is its child."""
    parent = tmp_path / "accelerate"
    parent.write_text(
        "import subprocess, sys\n"
        "ask = [sys.executable, '-c', sys.argv[-1]]\n"
        "sys.exit(subprocess.run(ask, stdin=subprocess.DEVNULL).returncode)"
    )
    environment = {key: os.environ[key] for key in os.environ if key not in WORLD_VARIABLES}
    environment |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
    question = (
        "from simmim.environment import ProcessEnvironment, process_environment\n"
        "environment = process_environment()\n"
        "print(environment.processes_to_start)\n"
        # As torchrun, which has then started this process.
        "ranks = dict(environment.variables) | {'WORLD_SIZE': '3'}\n"
        "print(ProcessEnvironment(variables=ranks).processes_to_start)\n"
    )
    options = ["--num_processes", "3", "--cpu"]
    done = subprocess.run(
        [sys.executable, str(parent), "launch", *options, *SIMMIM, question],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
        check=True,
    )
    assert done.stdout.split() == ["3", "1"]


@pytest.mark.parametrize("name", WORLD_VARIABLES)
def test_ranks_of_any_launcher_are_recognised(name: str) -> None:
    assert not ProcessEnvironment(variables={}).is_one_of_several
    assert not ProcessEnvironment(variables={name: "1"}).is_one_of_several
    assert ProcessEnvironment(variables={name: "2"}).is_one_of_several


@pytest.mark.parametrize(
    ("variables", "refusal"),
    [
        ({}, None),
        ({"FSDP_VERSION": "1"}, None),  # nobody asks for it
        ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version to 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            r"fsdp_activation_checkpointing .* execution",
        ),
        (
            {"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed.*fsdp2\.yaml"),
    ],
)
def test_unsupported_settings_of_accelerate_are_refused(
    variables: dict[str, str], refusal: str | None
) -> None:
    environment = ProcessEnvironment(variables=variables)
    if refusal is None:
        environment.check_parallelism()
        return
    with pytest.raises(ValueError, match=refusal):
        environment.check_parallelism()


def test_the_environment_is_read_once_and_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    environment = process_environment()
    monkeypatch.setenv("RANK", "4")
    assert process_environment() is environment
    assert environment.rank == 3
    with pytest.raises(TypeError):
        environment.variables["RANK"] = "5"  # type: ignore[index]


def test_changes_of_libraries_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("SIMMIM_TEST_VARIABLE", raising=False)
    with restored_variables():
        set_defaults({"ACCELERATE_USE_FSDP": "false", "SIMMIM_TEST_VARIABLE": "1"})
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
        with fsdp_hidden():
            assert "ACCELERATE_USE_FSDP" not in os.environ
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
        assert os.environ["SIMMIM_TEST_VARIABLE"] == "1"
    assert "SIMMIM_TEST_VARIABLE" not in os.environ
