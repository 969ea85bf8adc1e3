"""What each check of the doctor finds, on real shards and small recipes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simmim.doctor import hyperparameters
from simmim.doctor.checks import Check, attempt, table
from simmim.doctor.dry_run import (
    Speed,
    check_data_speed,
    check_duration,
    check_validation_time,
)
from simmim.doctor.hyperparameters import (
    check_learning_rate,
    check_masks,
    check_precision,
    check_schedule,
)
from simmim.doctor.memory import check_disk, check_memory
from simmim.doctor.shards import check_files, check_samples, check_workers, entries_of, sets_of
from simmim.engine.monitor.progress import duration
from simmim.method.strategies import MaskSettings
from simmim.recipe import load, parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.input_check import input_of
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage

ROOT = Path(__file__).parents[3]


@pytest.fixture
def recipe(pretrain_values: dict[str, Any]) -> PretrainRecipe:
    return parse(PretrainRecipe, pretrain_values, "test")


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "shards")


def stage_on(values: dict[str, Any], shards: Path) -> PretrainStage:
    values["data"]["shards"] = str(shards)
    return PretrainStage(parse(PretrainRecipe, values, "test"))


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def test_the_table_ends_with_a_verdict() -> None:
    fine = Check(name="one", verdict="ok", found="as it should be")
    odd = Check(name="two", verdict="warning", found="odd", change="change it")
    bad = Check(name="three", verdict="problem", found="a\nb")
    assert table([fine]).splitlines()[-1] == "0 problems, 0 warnings: training can start."
    lines = table([fine, odd, bad]).splitlines()
    assert lines[-1] == "1 problem, 1 warning: training would fail."
    assert lines[1].split() == ["warning", "two", "odd"]
    assert lines[2].strip() == "→ change it"
    assert lines[4].strip() == "b"


@pytest.mark.parametrize("error", [ValueError("broken"), OSError("broken"), KeyError("broken")])
def test_an_exception_in_a_check_is_a_problem(error: Exception) -> None:
    def examine() -> list[Check]:
        raise error

    (found,) = attempt("thing", examine)
    assert found.verdict == "problem"
    assert "broken" in found.found


@pytest.mark.parametrize("name", ["base-100ep", "base-800ep", "large-800ep", "giant-70m"])
def test_learning_rates_of_the_papers_are_ok(name: str) -> None:
    recipe = load(PretrainRecipe, ROOT / f"jobs/pretrain/{name}.yaml")
    found = check_learning_rate(recipe)
    assert found.verdict == "ok"
    assert "the papers' for" in found.found


def test_a_learning_rate_for_another_batch_is_a_warning() -> None:
    path = ROOT / "jobs/pretrain/base-800ep.yaml"
    small = load(PretrainRecipe, path, ["--training.batch_size", "128"])
    found = check_learning_rate(small)
    assert found.verdict == "warning"
    assert "near 5.0e-05" in found.change
    tuned = load(
        ClassificationRecipe, ROOT / "jobs/finetune/base-224.yaml", ["--init", "somewhere"]
    )
    assert check_learning_rate(tuned).verdict == "ok"


def test_custom_architectures_have_no_reference_learning_rate(recipe: PretrainRecipe) -> None:
    found = check_learning_rate(recipe)
    assert found.verdict == "ok"
    assert "papers have no learning rate" in found.found


def test_schedules(recipe: PretrainRecipe) -> None:
    training = recipe.training
    assert verdicts(list(check_schedule(training, 84))) == {"schedule": "warning"}
    warm = replace(training, schedule=replace(training.schedule, warmup_steps=2))
    assert verdicts(list(check_schedule(warm, 84))) == {"schedule": "ok"}
    long = replace(training, schedule=replace(training.schedule, warmup_steps=12))
    (found,) = check_schedule(long, 84)
    assert "never reaches" in found.found
    wild = replace(warm, clip_norm=None, batch_size=128)
    assert verdicts(list(check_schedule(wild, 84))) == {
        "schedule": "ok",
        "clipping": "warning",
        "batch": "warning",
    }


def test_precision_of_this_machine_is_measured() -> None:
    assert "matrix products in bf16" in check_precision("bf16", torch.device("cpu")).found


def files_of(stage: PretrainStage) -> Check:
    (shards,) = sets_of(stage.training_shards)
    return check_files(shards.folder, entries_of(shards))


def test_complete_files_are_ok(shards: Path, pretrain_values: dict[str, Any]) -> None:
    stage = stage_on(pretrain_values, shards)
    found = files_of(stage)
    assert found.verdict == "ok"


def test_missing_truncated_and_changed_files_are_named(
    copied: Path, pretrain_values: dict[str, Any]
) -> None:
    tars = sorted(copied.glob("*.tar"))
    stage = stage_on(pretrain_values, copied)
    tars[1].unlink()
    tars[2].write_bytes(tars[2].read_bytes()[:1024])
    changed = bytearray(tars[0].read_bytes())
    changed[-1] ^= 1
    tars[0].write_bytes(changed)
    found = files_of(stage)
    assert found.verdict == "problem"
    for tar, text in (
        (tars[0], "checksum"),
        (tars[1], "No such file"),
        (tars[2], "1,"),
    ):
        assert any(tar.name in line and text in line for line in found.found.splitlines())


def samples_of(stage: PretrainStage, **data: Any) -> list[Check]:
    changed = replace(stage.recipe.data, **data)
    wanted = replace(input_of(stage), mean=changed.mean, std=changed.std)
    return list(check_samples(stage.training_shards, changed, wanted))


def test_samples_are_decoded_and_measured(shards: Path, pretrain_values: dict[str, Any]) -> None:
    stage = stage_on(pretrain_values, shards)
    found = {check.name: check for check in samples_of(stage)}
    assert found["samples"].verdict == "ok"
    assert "84 decoded" in found["samples"].found
    assert found["image sizes"].verdict == "ok"
    assert "short sides 20 pixels; crops" in found["image sizes"].found
    assert found["channels"].found.startswith("84 images of 3 channels and 8 bits")
    assert found["statistics"].verdict == "warning"  # these are darker than ImageNet


def test_fitting_statistics_are_ok(shards: Path, pretrain_values: dict[str, Any]) -> None:
    stage = stage_on(pretrain_values, shards)
    text = next(check for check in samples_of(stage) if check.name == "statistics").found
    mean, std = (
        tuple(float(value) for value in text.split(name + " [")[1].split("]")[0].split(","))
        for name in ("mean", "std")
    )
    assert verdicts(samples_of(stage, mean=mean, std=std))["statistics"] == "ok"


def test_crops_larger_than_the_images_are_a_warning(
    shards: Path, pretrain_values: dict[str, Any]
) -> None:
    stage = stage_on(pretrain_values, shards)
    assert verdicts(samples_of(stage, image_size=64))["image sizes"] == "warning"


def test_too_many_damaged_images_are_a_problem(
    copied: Path, pretrain_values: dict[str, Any]
) -> None:
    tar = sorted(copied.glob("*.tar"))[0]
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"\x89PNG", b"\x00PNG", 3))
    stage = stage_on(pretrain_values, copied)
    found = samples_of(stage)[0]
    assert found.verdict == "problem"
    assert "3 damaged" in found.found
    assert samples_of(stage, max_bad_share=0.5)[0].verdict == "warning"


def test_more_workers_than_cores_are_a_warning() -> None:
    assert check_workers(0).verdict == "ok"
    assert check_workers(10_000).verdict == "warning"


def test_a_batch_too_large_for_memory_comes_with_a_remedy(
    pretrain_values: dict[str, Any],
) -> None:
    pretrain_values["training"]["batch_size"] = 2**24
    recipe = parse(PretrainRecipe, pretrain_values, "test")
    (found,) = check_memory(recipe, torch.device("cpu"), 1)
    assert found.verdict == "problem"
    assert "training.accumulation to" in found.change
    parts = int(found.change.split("training.accumulation to ")[1].split(";")[0])
    fitting = parse(
        PretrainRecipe,
        pretrain_values | {"training": pretrain_values["training"] | {"accumulation": 4 * parts}},
        "test",
    )
    assert [check.verdict for check in check_memory(fitting, torch.device("cpu"), 1)] == ["ok"]


def test_a_disk_too_small_for_the_checkpoints_is_a_problem(tmp_path: Path) -> None:
    model = torch.nn.Linear(1000, 1000)
    assert check_disk(tmp_path / "new" / "run", model, kept=3).verdict == "ok"
    assert check_disk(tmp_path, model, kept=10**9).verdict == "problem"
    found = check_disk(tmp_path, model, kept=10**9)
    assert found.verdict == "problem"
    assert "training.keep_last" in found.change


def test_slow_data_loading_comes_with_a_number_of_workers(recipe: PretrainRecipe) -> None:
    few = replace(recipe, data=replace(recipe.data, workers=1))
    fast = Speed(first_batch=1.0, data=500.0, compute=100.0)
    slow = Speed(first_batch=1.0, data=50.0, compute=100_000.0)
    assert check_data_speed(few, fast, 1).verdict == "ok"
    found = check_data_speed(few, slow, 1)
    assert found.verdict == "warning"
    assert "2400" in found.change or "2,400" in found.change


def test_rare_checkpoints_are_a_warning(pretrain_values: dict[str, Any]) -> None:
    pretrain_values["training"] |= {"steps": 100_000, "checkpoint_every": 10_000}
    recipe = parse(PretrainRecipe, pretrain_values, "test")
    stage = PretrainStage(recipe)
    found = {check.name: check for check in check_duration(stage, recipe, 8.0)}  # a step a second
    assert "27 h 47 min" in found["duration"].found
    assert found["checkpoints"].verdict == "warning"
    assert "to 900" in found["checkpoints"].change
    rare = {check.name: check for check in check_duration(stage, recipe, 8000.0)}
    assert rare["checkpoints"].verdict == "ok"


def test_the_average_distance_of_masks_is_reported() -> None:
    assert "AvgDist 15." in check_masks(MaskSettings(), 192).found
    small = check_masks(MaskSettings(cell=8, ratio=0.3), 192)
    assert "outside" in small.found
    assert small.verdict == "ok"


@pytest.mark.parametrize(
    ("steps", "every", "validations"), [(10, 500, 1), (1000, 500, 2), (1001, 500, 3)]
)
def test_the_validation_after_the_last_step_is_counted(
    pretrain_values: dict[str, Any], steps: int, every: int, validations: int
) -> None:
    pretrain_values["training"] |= {"steps": steps, "validate_every": every}
    recipe = parse(PretrainRecipe, pretrain_values, "test")
    stage = PretrainStage(recipe)
    assert stage.validation_shards is not None
    rate = 2.0
    found = check_validation_time(stage, recipe, rate)
    images = validations * stage.validation_shards.samples / 3
    share = images / (steps * recipe.training.batch_size)
    assert f"{validations} validation" in found.found
    assert f"{share:.1%}" in found.found
    assert f"about {duration(images / rate)}" in found.found
    assert found.verdict == ("warning" if share > 0.1 else "ok")


def test_epochs_of_warmup_that_round_to_no_step_are_explained(recipe: PretrainRecipe) -> None:
    schedule = replace(recipe.training.schedule, warmup_steps=0, warmup_epochs=10)
    training = replace(recipe.training, batch_size=2048, schedule=schedule)
    found = {check.name: check for check in check_schedule(training, 84)}["schedule"]
    assert found.verdict == "warning"
    assert "10 epochs" in found.found
    assert "training.batch_size" in found.change
    assert "warmup_epochs" not in found.change


@pytest.mark.parametrize("ratio", [0.004, 0.5, 1.0, 3.0, 250.0])
def test_the_ratio_of_precisions_is_never_0(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    peaks = {torch.float32: 1e12, torch.bfloat16: 1e12 / ratio}
    monkeypatch.setattr(hyperparameters, "measured_peak", lambda _, dtype: peaks[dtype])
    found = check_precision("fp32", torch.device("cpu")).found
    slower = ratio >= 1
    compared = f"take {ratio:g} times as long" if slower else f"are {1 / ratio:g} times as fast"
    assert f"matrix products in bf16 {compared}" in found
