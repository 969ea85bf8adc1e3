"""What a step takes of a device: the arithmetic by hand, the counting against a measured step."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.validation import adapter
from simmim.bench.choices import GIB, Precision
from simmim.bench.memory import (
    ModelSize,
    Placement,
    estimate_memory,
    largest_batch,
    model_size,
    run_cases,
    worst_peak,
)
from simmim.bench.step import (
    Peak,
    Simulation,
    StepCase,
    build_module,
    draw_batch,
    take_step,
)
from simmim.cli import main
from simmim.compat import fresh_accelerate_state
from simmim.method.settings import LossSettings
from simmim.method.strategies import MaskSettings
from tests.simmim.forked import finish

NONE = Placement(sharding="none", devices=1)
FSDP2 = Placement(sharding="fsdp2", devices=8)

SIZE = ModelSize(parameters=800, gathered=300, largest_unit=100, shards={1: 800, 8: 100})
SIMULATION = Simulation(
    peaks=(Peak(gradients=0, activations=5000), Peak(gradients=800, activations=3000))
)


def case(**changes: object) -> StepCase:
    values = {
        "variant": "tiny",
        "image_size": 64,
        "window_size": 8,
        "attention": "explicit",
        "checkpointing": "none",
        "precision": "fp32",
        "batch": 2,
    }
    return StepCase(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("placement", "precision", "weights", "optimizer", "gathered", "gradients", "activations"),
    [
        # 4 bytes each for weights, gradients and AdamW's two states.
        (NONE, "fp32", 3200, 6400, 0, 3200, 3000),
        (NONE, "bf16", 3200, 6400, 0, 3200, 3000),
        # Gradients of 2 bytes are too few to make up for the activations of the first peak.
        (NONE, "bf16-weights", 1600, 3200, 0, 0, 5000),
        (FSDP2, "fp32", 400, 800, 4 * (300 + 100), 0, 5000),
        (FSDP2, "bf16", 400, 800, 2 * (300 + 100), 0, 5000),
    ],
)
def test_the_memory_of_a_device(
    placement: Placement,
    precision: Precision,
    weights: int,
    optimizer: int,
    gathered: int,
    gradients: int,
    activations: int,
) -> None:
    found = estimate_memory(SIZE, SIMULATION, placement, precision, optimizer=True)
    assert (found.weights, found.optimizer, found.gathered) == (weights, optimizer, gathered)
    assert (found.gradients, found.activations) == (gradients, activations)
    assert found.total == weights + optimizer + gathered + gradients + activations
    assert estimate_memory(SIZE, SIMULATION, placement, precision, optimizer=False).optimizer == 0


def test_the_peak_depends_on_the_bytes_of_a_gradient() -> None:
    assert worst_peak(SIMULATION.peaks, 4).gradients == 800
    assert worst_peak(SIMULATION.peaks, 0.5).gradients == 0


@pytest.mark.parametrize(
    ("device_memory", "expected"),
    [
        (500, 0),
        (1010, 1),
        (1500, 50),
        (1999, 99),
        (2000, 100),
        (2010, 100),
        (2500, 125),
        (4000, 200),
    ],
)
def test_the_largest_batch_is_interpolated(device_memory: int, expected: int) -> None:
    def needed(images: int) -> int:
        return 1000 + 10 * min(images, 100) + 20 * max(0, images - 100)

    batches = {images: needed(images) for images in (1, 100, 200)}
    assert largest_batch(device_memory, batches) == expected


def test_the_largest_variant_is_as_large_as_published() -> None:
    size = model_size(case(variant="giant", image_size=192, window_size=12), {1, 64})
    assert size.parameters == pytest.approx(3.0e9, rel=0.01)
    assert size.shards[1] == size.parameters
    assert size.parameters / 64 <= size.shards[64] < 1.01 * size.parameters / 64


def test_a_simulated_step_tracks_live_memory() -> None:
    shallow = (("depths", (1, 1, 2, 1)),)
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "twice": {"batch": 4},
        "four times": {"batch": 8},
        "sequential": {"attention": "sequential"},
        "attention": {"checkpointing": "attention"},
        "full": {"checkpointing": "full"},
        "bf16": {"precision": "bf16"},
        "bf16 weights": {"precision": "bf16-weights"},
        "compiled": {"compiled": True},
        "compiled, full": {"compiled": True, "checkpointing": "full"},
    }
    steps = [case(sizes=shallow, **changes) for changes in cases.values()]
    found = dict(zip(cases, run_cases("simulate", steps), strict=True))
    parameters = model_size(steps[0], {1}).parameters
    for simulation in found.values():
        gradients = [peak.gradients for peak in simulation.peaks]
        assert gradients == sorted(set(gradients))
        assert gradients[-1] <= parameters
        activations = [peak.activations for peak in simulation.peaks]
        assert activations == sorted(activations, reverse=True)
    most = {name: simulation.peaks[0].activations for name, simulation in found.items()}
    assert most["full"] < most["attention"] < most["plain"]
    assert most["sequential"] < most["plain"]
    assert most["compiled"] != most["plain"]
    assert most["compiled, full"] < most["compiled"]
    assert most["bf16 weights"] < 0.6 * most["plain"]
    assert most["bf16"] > most["bf16 weights"] + parameters  # weights are kept in bf16, too
    two_images = most["twice"] - most["plain"]
    assert most["four times"] - most["twice"] == pytest.approx(2 * two_images, rel=0.02)


def test_a_case_survives_json() -> None:
    full = case(
        sizes=(("depths", (1, 1, 2, 1)), ("embed_dim", 24)),
        mask=MaskSettings(cell=16, strategy="block"),
        loss=LossSettings(norm_target=True),
    )
    assert adapter(StepCase).validate_json(json.dumps(asdict(full))) == full


def test_the_step_has_the_target_of_the_recipe() -> None:
    shallow = {"sizes": (("depths", (1, 1, 1, 1)),), "mask": MaskSettings(cell=16)}
    losses = {}
    for loss in (
        LossSettings(),
        LossSettings(name="l2"),
        LossSettings(norm_target=True),
        LossSettings(area="all"),
    ):
        step = case(**shallow, loss=loss)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses[loss] = float(build_module(step)(draw_batch(step)).detach())
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_the_step_is_that_of_training(optimizer: bool, precision: Precision) -> None:
    mask = MaskSettings(cell=16, strategy="block")
    step = case(
        sizes=(("depths", (1, 1, 1, 1)),), precision=precision, optimizer=optimizer, mask=mask
    )
    with fresh_accelerate_state():
        assert take_step(step, torch.device("cpu")) > 0


FEW_AND_ALL = """
from contextlib import nullcontext
from simmim.bench import step

case = step.StepCase(variant="tiny", image_size=64, window_size=8, attention="sequential",
    checkpointing="full", precision="fp32", batch=2, sizes=(("depths", (1, 1, 2, 1)),))
build = step.build_module

def one_window_at_a_time(case):
    module = build(case)
    module.model.encoder.set_execution(scores_at_a_time=2 * 64**2)
    return module

step.build_module = one_window_at_a_time
few = step.simulate(case)
step.only_two_groups = nullcontext
all_groups = step.simulate(case)
print(*[peak.activations for found in (few, all_groups) for peak in found.peaks[:1]])
"""


def test_few_groups_of_sequential_attention_have_the_peak_of_all(tmp_path: Path) -> None:
    text = finish(["-c", FEW_AND_ALL], tmp_path / "log")
    few, all_groups = map(int, text.splitlines()[-1].split())
    assert few == pytest.approx(all_groups, rel=1e-3)


def test_estimate_and_measurement_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    command = ["bench", "memory", "--variants", "tiny", "--sizes", "128/8", "--batch", "8"]
    more = ["--precision", "fp32", "--checkpointing", "none", "--devices", "1", "--json", str(file)]
    more += ["--device", "cpu"]
    assert main([*command, *more]) == 0
    (row,) = json.loads(file.read_text())
    assert 0.9 < row["ratio"] < 1.3
    assert row["ratio"] == row["measured"]["peak"] / row["needs"]["none"]["total"]
    printed = capsys.readouterr().out
    assert "eager blocks" in printed
    assert f"{row['ratio']:.2f}" in printed
    assert "ratio: measured /" in printed


def test_the_tables_are_aligned_and_complete(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "memory.json"
    command = ["bench", "memory", "--variants", "tiny", "--sizes", "64/8", "32/4"]
    more = ["--checkpointing", "full", "--no-measure", "--devices", "1", "8"]
    last = ["--device-memory", "2", "--json", str(file)]
    assert main([*command, *more, *last]) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 2
    printed = capsys.readouterr().out.splitlines()
    heads = [line for line in printed if line.startswith("variant")]
    assert [head.split()[-2:] for head in heads] == [["none", "fsdp2/8"]] * 2
    assert "attention sequential, compiled blocks" in printed[0]
    assert all(row["case"]["compiled"] for row in rows)
    lines = [line for line in printed if line.startswith("tiny")]
    assert len(lines) == 2 * len(rows)
    assert {len(line) for line in lines[: len(rows)]} == {len(heads[0])}
    for row, line in zip(rows, lines, strict=False):
        assert line.split()[-2:] == [
            f"{row['needs'][name]['total'] / GIB:.2f}" for name in ("none", "fsdp2/8")
        ]
        assert row["measured"] is None
        assert row["ratio"] is None
        assert row["largest_batch"]["fsdp2/8"] > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sizes", "192"], "give IMAGE/WINDOW"),
        (["--sizes", "100/8"], "multiple of the mask cell"),
        (["--variants", "huger"], "'huger' is not published; choose of tiny,"),
        (["--batch", "0"], "--batch is 0; it must be 1 or more."),
        (["--sharding", "fsdp"], 'Choose from: "none", "fsdp2"'),
        (["--devices", "0"], "--devices is 0; it must be 1 or more."),
    ],
)
def test_impossible_arguments_are_explained(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "memory", *wrong]) == 2
    assert message in capsys.readouterr().err


CUDA_RULES = """
from torch import nn
from simmim.bench import step
from swinv2 import blocks

def layer_norm(precise):
    blocks.LayerNorm = nn.LayerNorm if precise else ours
    case = step.StepCase(variant="tiny", image_size=64, window_size=8, attention="auto",
        checkpointing="none", precision="bf16", batch=16, device="{device}",
        sizes=(("depths", (1, 1, 2, 1)),))
    return step.simulate(case).peaks[0].activations

ours = blocks.LayerNorm
print(layer_norm(False), layer_norm(True))
"""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_activations_are_counted_by_the_rules_of_the_device(device: str, tmp_path: Path) -> None:
    """PyTorch's LayerNorm returns float32 under autocast on CUDA, and bfloat16 on a CPU."""
    text = finish(["-c", CUDA_RULES.replace("{device}", device)], tmp_path / "log")
    ours, pytorch = map(int, text.splitlines()[-1].split())
    assert (pytorch > 1.03 * ours) == (device == "cuda")
