"""Training compares the memory that it needs with the machine's before it starts."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from simmim.bench.choices import GIB
from simmim.bench.memory import Placement, make_rows
from simmim.bench.step import StepCase
from simmim.cli import main
from simmim.doctor import fits
from simmim.doctor.dry_run import warn_of_long_steps
from simmim.doctor.estimates import (
    least_activations,
    least_parameters,
    most_activations,
    most_parameters,
    share_kept,
)
from simmim.doctor.fits import check_fits
from simmim.doctor.machine import machine_memory
from simmim.doctor.memory import step_case
from simmim.environment import process_environment
from simmim.method.settings import LossSettings
from simmim.quickstart import check_memory, embedded_recipe
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
    with pytest.raises(ValueError, match=r"96 images") as caught:
        check_fits(recipe_of(batch_size=96))
    text = str(caught.value)
    for part in ("21.8 GiB", "16.0 GiB", "training.accumulation", "--ignore-memory", "image_size"):
        assert part in text
    machine["memory"] = 32 * GIB
    check_fits(recipe_of(batch_size=96))


@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_are_counted_as_the_recipe_runs_them(
    machine: dict[str, int], capsys: pytest.CaptureFixture[str], compiled: bool
) -> None:
    values = {**BASE, "execution": {"compile": compiled}}
    values["training"] = {**BASE["training"], "batch_size": 96}
    recipe = parse(task_named("pretrain", "test").recipe, values, "test")
    assert step_case(recipe, 2, recipe.step_for_estimate).compiled == compiled
    with pytest.raises(ValueError, match="96 images"):
        check_fits(recipe)
    blocks = "compiled" if compiled else "eager"
    assert f"a training step with {blocks} blocks" in capsys.readouterr().err
    assert machine["counted"] == 1


def test_what_clearly_does_not_fit_is_not_simulated(machine: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 2\d\d\.\d GiB .* raise .*accumulation to \d+"):
        check_fits(recipe_of())
    assert machine["counted"] == 0


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": 2**30, "num_heads": [1, 1, 1, 1]},
        {"depths": [1000, 1000, 1000, 1000]},
        {"mlp_ratio": 1000},
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "doctor"])
def test_sizes_beyond_all_measure_are_refused_at_once(
    machine: dict[str, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sizes: dict[str, Any],
    command: str,
) -> None:
    config = tmp_path / "huge.yaml"
    config.write_text(json.dumps({**BASE, "encoder": {**BASE["encoder"], **sizes}}))
    assert main([command, "--config", str(config), "--folder", str(tmp_path / "run")]) == 2
    said = "".join(capsys.readouterr())
    assert "at least" in said
    assert "encoder." in said
    assert machine["counted"] == 0


def test_the_quickstart_is_refused_on_a_small_machine(
    machine: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine["memory"] = GIB
    assert main(["quickstart", "--folder", str(tmp_path / "run")]) == 2
    assert "has 1.0 GiB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    machine["memory"] = 2 * GIB
    check_memory(embedded_recipe(tmp_path))


def test_all_ranks_of_the_machine_count(
    machine: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["step"] = 6 * GIB
    check_fits(recipe_of(batch_size=96))
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    process_environment.cache_clear()
    with pytest.raises(ValueError, match=r"4 processes, and this machine has 16\.0 GiB"):
        check_fits(recipe_of(batch_size=96))
    monkeypatch.setenv("LOCAL_RANK", "1")
    process_environment.cache_clear()
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
    assert "the same sample is in a batch 19 or 20 times" in text
    assert "2 times;" in batch_above_data(8, 4)[0]


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
    assert 0.9 * real < least_parameters(config) < real


def test_the_step_that_is_counted_is_that_of_the_recipe() -> None:
    values = {
        **BASE,
        "encoder": {"variant": "base", "window_size": 6, "depths": [1, 1, 2, 1]},
        "mask": {"cell": 16, "ratio": 0.4, "strategy": "square"},
        "loss": {"name": "l2", "norm_target": True},
        "execution": {"checkpointing": "full"},
    }
    recipe = parse(task_named("pretrain", "test").recipe, values, "test")
    found = step_case(recipe, 2, recipe.step_for_estimate).recipe
    assert (found.mask, found.loss, found.encoder) == (recipe.mask, recipe.loss, recipe.encoder)
    features = {**values, "loss": {"target": "features", "target_encoder": "somewhere"}}
    recipe = parse(task_named("pretrain", "test").recipe, features, "test")
    _, loss = recipe.step_for_estimate
    assert loss.target_name == "pixels"  # the frozen encoder is counted apart
    classifier = recipe_of("classification")
    assert step_case(classifier, 2, classifier.step_for_estimate).recipe.loss == LossSettings()


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
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_estimated_from_below(checkpointing: Any, precision: Any) -> None:
    values = {
        **BASE,
        "encoder": {"variant": "tiny", "window_size": 12},
        "execution": {"checkpointing": checkpointing, "attention": "sequential"},
    }
    values["training"] = {**BASE["training"], "precision": precision}
    recipe = parse(task_named("pretrain", "test").recipe, values, "test")
    (row,) = make_rows(
        [step_case(recipe, 4, recipe.step_for_estimate)],
        [Placement(sharding="none", devices=1)],
        device_memory=None,
        measure=False,
        say=lambda _: None,
    )
    least = 4 * least_activations(recipe.encoder.config(192)) * share_kept(recipe)
    assert 0.1 * row.activations < least < row.activations


@pytest.mark.slow
def test_base_with_2048_images_is_refused_on_16_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "machine_memory", lambda: 16 * GIB)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"raise training\.accumulation to \d+"):
        check_fits(recipe_of())
