"""Lines of metrics, and the measurements in them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.monitor.hardware import (
    DevicePeak,
    device_peak,
    known_peak,
    memory_in_use,
    utilisation,
)
from simmim.engine.monitor.progress import Clock, Forecast, duration
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage


def run_training(values: dict[str, Any], folder: Path, resume: str | None = None) -> RunFolder:
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    run = RunFolder(path=folder)
    train(stage, run, build_accelerator("fp32"), resume)
    return run


def test_a_metrics_line_has_all_figures(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    run = run_training(pretrain_values, tmp_path / "run")
    lines = [line for line in run.read_metrics() if "loss" in line]
    for line in lines:
        assert line["samples"] == 8 * line["step"]
        assert line["epoch"] == pytest.approx(line["samples"] / 84, abs=1e-4)
        assert 0 <= line["data_wait"] <= 1
        assert line["mfu"] > 0
        assert line["mfu_peak"] == "matmul"
        assert line["device_memory_gib"] == 0
        assert 0.05 < line["host_memory_gib"] < 64
        assert line["mean_color_loss"] > 0
    assert lines[-1]["eta_seconds"] == 0
    assert lines[0]["eta_seconds"] >= 0


def test_the_baseline_is_taken_from_validation(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    lines = run_training(pretrain_values, tmp_path / "run").read_metrics()
    beside = [line["mean_color_loss"] for line in lines if "lr" in line]
    validated = [line["mean_color_loss"] for line in lines if "validation_loss" in line]
    assert beside == pytest.approx([validated[0]] * 6, rel=1e-5)  # summed up in other batches
    assert beside[-1] == validated[0]


def test_without_validation_data_there_is_no_baseline(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    pretrain_values["data"]["validation_shards"] = 0
    lines = run_training(pretrain_values, tmp_path / "run").read_metrics()
    assert all("mean_color_loss" not in line and "validation_loss" not in line for line in lines)


def test_the_environment_is_written(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    run = run_training(pretrain_values, tmp_path / "run")
    found = json.loads(run.environment.read_text())
    assert found["torch"] == torch.__version__
    assert found["processes"] == 1


def test_a_pause_does_not_count() -> None:
    clock = Clock()
    clock.restart()
    clock.add(100, 0.0)
    with clock.paused():
        time.sleep(0.3)
    assert clock.read().images_per_second > 1000
    clock.add(10, 0.0)
    clock.restart()
    assert clock.read().images_per_second == 0


def test_the_forecast_extrapolates_the_steps_so_far() -> None:
    forecast = Forecast(100, 200)
    time.sleep(0.2)
    assert forecast.seconds_left(150) == pytest.approx(0.2, rel=0.5)
    assert forecast.seconds_left(200) == 0


def test_utilisation_counts_three_forward_passes() -> None:
    peak = DevicePeak(flops=1e12, source="matmul")
    assert utilisation(10**9, 100, peak, devices=1) == pytest.approx(0.3)
    assert utilisation(10**9, 100, peak, devices=2) == pytest.approx(0.15)


def test_the_peak_of_this_machine_is_measured() -> None:
    peak = device_peak(torch.device("cpu"), "fp32")
    assert peak.source == "matmul"
    assert 1e8 < peak.flops < 1e14


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_peaks_are_known_by_whole_names(name: str, flops: float | None) -> None:
    assert known_peak(name) == flops


def test_memory_in_use_includes_tensors_on_the_host() -> None:
    size = 2**30  # more than what the process has freed and kept
    before = memory_in_use(torch.device("cpu")).host
    held = torch.ones(size // 4)
    assert memory_in_use(torch.device("cpu")).host - before > size / 2
    assert len(held)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (7 * 60, "7 min"), (7500, "2 h 05 min"), (280_000, "3 d 6 h")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
