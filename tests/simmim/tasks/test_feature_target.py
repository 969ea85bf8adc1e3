"""Pretraining that predicts features of a frozen encoder, end to end."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import simmim
from simmim.bench.live_bytes import LiveBytes
from simmim.bench.memory import Placement
from simmim.doctor.estimates import frozen_memory, least_memory
from simmim.doctor.examine import examine
from simmim.doctor.fits import Room, count_need, most_memory
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.devices import build_accelerator, prepare
from simmim.engine.distributed.sharding import shard_by_block
from simmim.engine.generators import seeded
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.export.export import export
from simmim.method.targets import Features
from simmim.recipe import parse
from simmim.report.page import write_report
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from swinv2 import load_encoder, save_encoder
from tests.simmim.conftest import MEAN, STD, small_encoder


@pytest.fixture
def encoder_directory(tmp_path: Path) -> Path:
    """A frozen encoder whose weights do not depend on the tests that ran before."""
    with seeded(0):
        encoder = small_encoder()
    return save_encoder(encoder, tmp_path / "encoder", mean=MEAN, std=STD)


@pytest.fixture
def values(pretrain_values: dict[str, Any], encoder_directory: Path) -> dict[str, Any]:
    pretrain_values["loss"] = {
        "name": "l1",
        "target": "features",
        "target_encoder": str(encoder_directory),
    }
    pretrain_values["training"] |= {"steps": 60, "optimizer": {"lr": 1e-2}}
    return pretrain_values


def build(values: dict[str, Any]) -> PretrainStage:
    return PretrainStage(parse(PretrainRecipe, values, "test"))


def test_it_trains_and_leaves_the_frozen_encoder_alone(
    values: dict[str, Any], encoder_directory: Path, tmp_path: Path
) -> None:
    run, stage = RunFolder(path=tmp_path / "run"), build(values)
    target = stage.model.target
    assert isinstance(target, Features)
    train(stage, run, build_accelerator("fp32"), None, write_report=write_report)
    lines = run.read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.75 * losses[0]
    assert lines[-1]["validation_loss"] < lines[-1]["mean_feature_loss"]
    assert "mean feature" in run.report.read_text()
    assert not run.reconstructions.exists()

    before = load_encoder(encoder_directory).state_dict()
    assert all(torch.equal(one, before[name]) for name, one in target.encoder.state_dict().items())
    saved = read_model(run.checkpoints / "step-00000060")
    assert saved["model.decoder.projection.weight"].shape[0] == target.channels
    assert saved.keys() == stage.module.state_dict().keys()
    with pytest.raises(ValueError, match="features cannot be drawn"):
        stage.visualize(build_accelerator("fp32"), run, 1)

    lines_of_export = export(run.path, tmp_path / "timm", "timm")
    told = [line for line in lines_of_export if "not exported: mask token and decoder" in line]
    assert len(told) == 1
    assert "they predict features" in told[0]


def test_it_resumes_in_bits(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"steps": 8, "checkpoint_every": 4, "validate_every": 6}
    whole, broken = RunFolder(path=tmp_path / "whole"), RunFolder(path=tmp_path / "broken")
    train(build(values), whole, build_accelerator("fp32"), None)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PretrainStage, "validate", die)
        with pytest.raises(KeyboardInterrupt):
            train(build(values), broken, build_accelerator("fp32"), None)
    train(build(values), broken, build_accelerator("fp32"), "auto")
    one, two = (read_model(run.checkpoints / "step-00000008") for run in (whole, broken))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_initial_weights_are_those_of_pixels(values: dict[str, Any]) -> None:
    stage = build(values)
    pixels = build({name: part for name, part in values.items() if name != "loss"})
    weights = pixels.encoder.state_dict()
    assert all(torch.equal(one, weights[name]) for name, one in stage.encoder.state_dict().items())
    assert stage.flops_per_sample > 0


def test_only_the_model_is_optimised(values: dict[str, Any]) -> None:
    stage = build(values)
    _, optimizer = prepare(stage, build_accelerator("fp32"))
    optimised = {id(one) for group in optimizer.param_groups for one in group["params"]}
    target = stage.model.target
    assert isinstance(target, Features)
    assert optimised == {id(one) for one in stage.module.parameters()}
    assert not optimised & {id(one) for one in target.encoder.parameters()}


def test_images_are_converted_to_the_frozen_encoders_mean_and_std(values: dict[str, Any]) -> None:
    stage = build(values)
    stored = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    target = stage.model.target
    assert isinstance(target, Features)
    own = (stored / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    wanted = Features(target.encoder)(own)
    torch.testing.assert_close(target(stage.module.normalise(stored)), wanted, rtol=1e-4, atol=1e-4)


def test_sharded_weights_have_the_same_loss(values: dict[str, Any], tmp_path: Path) -> None:
    stage = build(values)
    batch = next(iter(stage.batches(rank=0, world=1, start=0, end=8)))
    stage.module.eval()
    whole = stage.module(batch)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shard_by_block(stage.module, init_device_mesh("cpu", (1,)), param_dtype=None)
        assert torch.equal(stage.module(batch), whole)
    finally:
        dist.destroy_process_group()
    target = stage.model.target
    assert isinstance(target, Features)
    assert not any(isinstance(one, DTensor) for one in target.encoder.parameters())


def test_a_checkpoint_is_exported_without_the_frozen_encoder(
    values: dict[str, Any], encoder_directory: Path, tmp_path: Path
) -> None:
    run = RunFolder(path=tmp_path / "run")
    values["training"] |= {"steps": 2, "checkpoint_every": 2}
    train(build(values), run, build_accelerator("fp32"), None)
    shutil.rmtree(encoder_directory)
    export(run.path, tmp_path / "native", "native")
    trained, exported = (load_encoder(path) for path in (run.encoder, tmp_path / "native"))
    assert all(
        torch.equal(one, exported.state_dict()[name]) for name, one in trained.state_dict().items()
    )


def test_doctor_counts_the_frozen_encoder(values: dict[str, Any], tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    checks = examine(build(values), run, build_accelerator("fp32"), resume=None, seconds=0.1)
    assert not [check for check in checks if check.verdict == "problem"]


def test_the_estimate_of_a_frozen_encoder_bounds_what_it_takes(values: dict[str, Any]) -> None:
    stage = build(values)
    target = stage.model.target
    assert isinstance(target, Features)
    images = torch.randn(4, 3, 16, 16)
    target(images)  # position tables are computed once
    with LiveBytes() as live:
        target(images)
    weights = 4 * sum(one.numel() for one in target.encoder.parameters())
    counted = frozen_memory(stage.recipe, 4)
    assert frozen_memory(stage.recipe, 0) == weights
    assert live.most < counted < 3 * live.most


def test_the_memory_of_training_has_the_frozen_encoder(values: dict[str, Any]) -> None:
    recipe, pixels = (
        parse(PretrainRecipe, given, "test")
        for given in (values, {name: part for name, part in values.items() if name != "loss"})
    )
    config, whole = recipe.encoder.config(16), Placement(sharding="none", devices=1)
    least = least_memory(pixels, config, 4, whole)
    weights = frozen_memory(recipe, 0)
    assert least_memory(recipe, config, 4, whole) == least + weights
    room = Room(there=round(least + weights / 2), processes=1, world=1, on_gpu=False)
    more = most_memory(recipe, 4, room) - most_memory(pixels, 4, room)
    assert more == pytest.approx(frozen_memory(recipe, 4), rel=1e-6)
    need = count_need(recipe, 4, room)
    assert need is not None
    assert need.number > room.there > least


def test_the_start_says_that_nothing_is_drawn(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["training"] |= {"steps": 1}
    simmim.pretrain(values, tmp_path / "run", check_memory=False)
    line = "no reconstructions are drawn: loss.target is features"
    assert capsys.readouterr().err.count(line) == 1


def test_an_encoder_that_cannot_be_the_target_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["loss"]["target_encoder"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"loss\.target_encoder: .*nowhere"):
        build(values)
