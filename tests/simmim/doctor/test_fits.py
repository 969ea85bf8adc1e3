"""Training compares the memory that it needs with the machine's before it starts."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from simmim.bench.memory import GIB, Placement, make_rows
from simmim.bench.step import StepCase
from simmim.cli import main
from simmim.doctor import fits
from simmim.doctor.dry_run import warn_of_long_steps
from simmim.doctor.fits import check_fits, most_activations, most_parameters
from simmim.doctor.machine import machine_memory
from simmim.recipe import parse
from simmim.tasks.all_tasks import task_named
from simmim.tasks.train import batch_above_data
from swinv2 import VARIANTS, SwinV2, variant_config

BASE = {
    "task": "pretrain",
    "encoder": {"variant": "base", "window_size": 12},
    "data": {"shards": "shards", "image_size": 192},
    "training": {"batch_size": 2048, "steps": 1, "optimizer": {"lr": 1e-3}},
}


def recipe_of(task: str = "pretrain", **training: Any) -> Any:
    values: dict[str, Any] = {**BASE, "task": task, "training": {**BASE["training"], **training}}
    return parse(task_named(task, "test").recipe, values, "test")


def groups(root: Path, lines: str, limits: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for place, text in limits.items():
        file = root / "sys/fs/cgroup" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "1000000\n"}, 1000000),
        ("0::/a/b\n", {"a/b/memory.max": "500\n", "a/memory.max": "1000\n"}, 500),
        ("0::/of/the/host\n", {"memory.max": "700\n"}, 700),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "800\n"}, 800),
        ("4:cpu,memory:/x\n", {"memory/memory.limit_in_bytes": "900\n"}, 900),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "5\n"}, None),
        ("nonsense\n0::/\n", {"memory.max": "max\n"}, None),
    ],
)
def test_the_lowest_limit_of_the_control_groups_counts(
    tmp_path: Path, lines: str, limits: dict[str, str], expected: int | None
) -> None:
    found = machine_memory(groups(tmp_path, lines, limits))
    assert found == (psutil.virtual_memory().total if expected is None else expected)
    assert machine_memory(tmp_path / "absent") == psutil.virtual_memory().total


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine without a GPU, whose memory and counted step a test sets."""
    found = {"memory": 16 * GIB, "step": 20 * GIB, "counted": 0}

    def count(_case: StepCase, _placement: Placement) -> int:
        found["counted"] += 1
        return found["step"]

    monkeypatch.setattr(fits, "machine_memory", lambda: found["memory"])
    monkeypatch.setattr(fits, "needed_memory", count)
    monkeypatch.setattr(fits, "advise", lambda *_: "raise training.accumulation to 64")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return found


def test_what_does_not_fit_is_refused_with_figures_and_remedies(machine: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"2,048 images") as caught:
        check_fits(recipe_of())
    text = str(caught.value)
    for part in ("21.5 GiB", "16.0 GiB", "training.accumulation", "--ignore-memory", "image_size"):
        assert part in text
    machine["memory"] = 32 * GIB
    check_fits(recipe_of())


def test_all_ranks_of_the_machine_count(
    machine: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["step"] = 6 * GIB
    check_fits(recipe_of())
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=r"4 processes, and this machine has 16\.0 GiB"):
        check_fits(recipe_of())
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_fits(recipe_of())  # the first rank of the machine speaks for it


def test_what_clearly_fits_is_not_simulated(machine: dict[str, int]) -> None:
    check_fits(recipe_of(batch_size=8))
    assert machine["counted"] == 0
    check_fits(recipe_of(batch_size=2048, accumulation=256))
    assert machine["counted"] == 0


@pytest.mark.parametrize("task", ["pretrain", "classification"])
def test_a_gpu_is_warned_of(
    machine: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 2 * GIB))
    check_fits(recipe_of(task) if task == "pretrain" else recipe_of())
    assert "this GPU has 2.0 GiB" in capsys.readouterr().err


def test_the_command_ends_with_2_unless_it_is_told_to_go_on(
    machine: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "base.yaml"
    config.write_text(
        "task: pretrain\nencoder: {variant: base, window_size: 12}\n"
        "data: {shards: absent, image_size: 192}\n"
        "training: {batch_size: 2048, steps: 1, optimizer: {lr: 0.001}}\n"
    )
    command = ["pretrain", "--config", str(config), "--folder", str(tmp_path / "run")]
    assert main(command) == 2
    assert "--ignore-memory" in capsys.readouterr().err
    assert main([*command, "--ignore-memory"]) == 2
    assert "absent" in capsys.readouterr().err  # the next thing to mend
    assert not (tmp_path / "run").exists()


def test_a_batch_above_the_data_set_is_said() -> None:
    assert batch_above_data(8, 8) == []
    (text,) = batch_above_data(2048, 107)
    assert "2,048 is larger than the data set" in text
    assert "107 samples" in text
    assert "19.1 times" in text


def test_doctor_says_how_long_a_step_of_a_large_batch_takes() -> None:
    assert warn_of_long_steps(flops=1e9, batch_size=8, peak=1e12, seconds=5) is None
    text = warn_of_long_steps(flops=3e10, batch_size=2048, peak=1e11, seconds=5)
    assert text is not None
    assert "2,048" in text
    assert "min" in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_estimated_from_above(variant: str) -> None:
    config = variant_config(variant, image_size=192, window_size=12)
    with torch.device("meta"):
        encoder = SwinV2(config)
    real = sum(parameter.numel() for parameter in encoder.parameters())
    assert real < most_parameters(config) < 1.3 * real + 4e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "size", "window", "attention"),
    [("tiny", 192, 12, "auto"), ("base", 192, 12, "explicit"), ("base", 384, 24, "auto")],
)
def test_activations_are_estimated_from_above(
    variant: str, size: int, window: int, attention: Any
) -> None:
    case = StepCase(
        variant=variant,
        image_size=size,
        window_size=window,
        attention=attention,
        checkpointing="none",
        precision="fp32",
        batch=4,
    )
    (row,) = make_rows(
        [case],
        [Placement(sharding="none", devices=1)],
        device_memory=None,
        measure=False,
        say=lambda _: None,
    )
    most = 4 * most_activations(variant_config(variant, image_size=size, window_size=window))
    assert row.activations < most < fits.HEAD_ROOM * row.activations


@pytest.mark.slow
def test_base_with_2048_images_is_refused_on_16_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "machine_memory", lambda: 16 * GIB)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"raise training\.accumulation to \d+"):
        check_fits(recipe_of())
