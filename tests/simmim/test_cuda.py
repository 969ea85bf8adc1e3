"""On a GPU the encoder computes what it computes on a CPU, and trains, resumes and exports.

pytest -m gpu tests/simmim/test_cuda.py
"""

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from simmim.bench.gpu.cells import Cell, Results, Skipped
from simmim.bench.gpu.plan import make_plan
from simmim.bench.gpu.scale import FULL
from simmim.bench.gpu.selftest import (
    build_moving_encoder,
    features_and_gradients,
    images_of,
    no_waiting,
    relative_error,
)
from simmim.cli import main
from simmim.data.loader.batch import Batch
from simmim.engine.devices import build_accelerator, own_process_state, prepare
from simmim.engine.generators import seeded
from simmim.engine.loop import training_step
from simmim.engine.run import RunFolder
from simmim.method.model import SimMIM
from simmim.method.targets import normalise_target
from simmim.recipe import parse
from simmim.tasks.all_tasks import task_named
from swinv2 import SwinV2, build_encoder, load_encoder
from tests.simmim.tasks.dense_values import dense_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # of torch's compiler
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DEVICE = torch.device("cuda")
CELLS = [
    cell
    for cell in make_plan(FULL, Results(Path(), {}))
    if cell.name.startswith("selftest/")
    or cell.name in ("machine/environment", "machine/process groups")
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_self_test_passes(cell: Cell) -> None:
    """As `simmim bench gpu` runs it: attention paths, steps, memory, training."""
    try:
        cell.run()
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def encoder() -> SwinV2:
    return build_moving_encoder(
        image_size=192, window_size=12, embed_dim=48, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16)
    )


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_checkpointing_changes_nothing(encoder: SwinV2, checkpointing: Any) -> None:
    results = []
    for setting in ("none", checkpointing):
        ours = copy.deepcopy(encoder).to(DEVICE)
        ours.set_execution(checkpointing=setting)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            results.append(features_and_gradients(ours, images_of((192, 192)).to(DEVICE)))
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[1][1], results[0][1].double().cpu()) <= 1e-2


def test_large_windows_fit_and_are_finite() -> None:
    encoder = build_encoder("tiny", image_size=1536, window_size=48)
    encoder.set_execution(attention="sequential", checkpointing="full")
    model = SimMIM(encoder).to(DEVICE).train()
    mask = torch.rand(1, 48, 48, device=DEVICE) < 0.6
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(torch.randn(1, 3, 1536, 1536, device=DEVICE), mask).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("task", ["pretrain", "classification"])
def test_steps_of_a_stage_never_wait_for_the_device(
    pretrain_values: dict[str, Any],
    classification_values: dict[str, Any],
    task: str,
    compiled: bool,
) -> None:
    values = pretrain_values if task == "pretrain" else classification_values
    kind = task_named(task, Path("test"))
    stage: Any = kind.stage(
        parse(kind.recipe, values | {"execution": {"compile": compiled}}, "test")  # type: ignore[arg-type]
    )
    with own_process_state():
        accelerator = build_accelerator("bf16")
        module, optimizer = prepare(stage, accelerator)
        size = values["training"]["batch_size"]
        batches: list[Batch] = list(stage.batches(rank=0, world=1, start=0, end=6 * size))
        for number, batch in enumerate(batches):
            with no_waiting(DEVICE) if number >= 3 else nullcontext():
                loss, _ = training_step(
                    accelerator,
                    module.train(),
                    optimizer,
                    [batch],
                    clip_norm=5.0,
                    normalisers=stage.normalisers,
                )
        assert loss.isfinite()


@pytest.mark.parametrize(
    ("task", "kind"),
    [("segmentation", "mask2former"), ("detection", "mask2former"), ("detection", "rt_detr")],
)
def test_steps_that_match_queries_wait_for_the_device_once(
    classification_values: dict[str, Any], tmp_path: Path, task: str, kind: str
) -> None:
    values = dense_values(tmp_path, classification_values["encoder"], task, kind)
    stage: Any = task_named(task, Path("test")).stage(
        parse(task_named(task, Path("test")).recipe, values, "test")  # type: ignore[arg-type]
    )
    with own_process_state():
        accelerator = build_accelerator("bf16")
        module, optimizer = prepare(stage, accelerator)
        for batch in list(stage.batches(rank=0, world=1, start=0, end=16)):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                training_step(
                    accelerator,
                    module.train(),
                    optimizer,
                    [batch],
                    clip_norm=5.0,
                    normalisers=stage.normalisers,
                )
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchronizing" in str(one.message)]
    assert len(waits) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_resumes_and_exports(
    pretrain_values: dict[str, Any], tmp_path: Path, precision: str, compiled: bool
) -> None:
    pretrain_values["training"] |= {"precision": precision, "steps": 60, "optimizer": {"lr": 3e-3}}
    pretrain_values["execution"] = {"compile": compiled}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(pretrain_values))
    folder = tmp_path / "run"
    command = ["pretrain", "--config", str(recipe), "--folder", str(folder)]
    assert main(command) == 0
    longer = ["--resume", "auto", "--allow-recipe-changes", "--training.steps", "80"]
    assert main([*command, *longer]) == 0
    losses = [line["loss"] for line in RunFolder(path=folder).read_metrics() if "loss" in line]
    assert len(losses) == 80 // pretrain_values["training"]["log_every"]
    assert sum(losses[-5:]) < sum(losses[:5])
    target = tmp_path / "encoder"
    assert main(["export", str(folder), str(target)]) == 0
    assert load_encoder(target).config.embed_dim == 16


def test_targets_are_float32_whatever_autocast_and_tf32_say() -> None:
    images = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    with own_process_state(), torch.autocast("cuda", torch.bfloat16):
        torch.set_float32_matmul_precision("medium")
        target = normalise_target(images.to(DEVICE))
        assert torch.equal(normalise_target(images.to(DEVICE)), target)
    torch.testing.assert_close(target.cpu(), normalise_target(images), rtol=0, atol=1e-5)


def test_a_run_leaves_the_generators_of_the_caller() -> None:
    torch.rand(3, device=DEVICE)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    with own_process_state():
        torch.manual_seed(1)
        torch.rand(3, device=DEVICE)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    with seeded(1):
        torch.rand(3)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
