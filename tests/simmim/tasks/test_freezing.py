"""Training with frozen stages: weights stay, resume in bits, a head alone costs inference."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simmim.engine.checkpoint.resume import read_model
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.optimizer import parameter_groups
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.pretrain.recipe import PretrainRecipe
from swinv2.weights import load_encoder
from tests.simmim.forked import finish


def with_freeze(values: dict[str, Any], freeze: int | str, **execution: Any) -> dict[str, Any]:
    optimizer = values["training"]["optimizer"] | {"freeze": freeze}
    training = values["training"] | {"optimizer": optimizer}
    return values | {"training": training, "execution": execution}


def build_stage(values: dict[str, Any]) -> ClassificationStage:
    return ClassificationStage(parse(ClassificationRecipe, values, "test"))


def run_training(values: dict[str, Any], folder: Path, resume: str | None = None) -> None:
    train(build_stage(values), RunFolder(path=folder), build_accelerator("fp32"), resume)


@pytest.mark.parametrize("freeze", [1, 2, "all"])
def test_frozen_weights_stay_and_others_train(
    classification_values: dict[str, Any],
    encoder_directory: Path,
    tmp_path: Path,
    freeze: int | str,
) -> None:
    values = classification_values | {"init": str(encoder_directory)}
    run_training(with_freeze(values, freeze), tmp_path / "run")
    before = load_encoder(encoder_directory).state_dict()
    after = load_encoder(tmp_path / "run" / "encoder").state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    kept = {"patch_embed.", "stages.0.", "merges.0."} | ({"stages.1."} if freeze != 1 else set())
    kept |= {"norm."} if freeze == "all" else set()
    assert same == {name for name in before if name.startswith(tuple(kept))}
    assert (tmp_path / "run" / "classifier").is_dir()


@pytest.mark.parametrize("freeze", [1, "all"])
@pytest.mark.parametrize("average", [None, 0.9])
def test_a_resumed_run_equals_an_uninterrupted_one_in_bits(
    classification_values: dict[str, Any], tmp_path: Path, freeze: int | str, average: float | None
) -> None:
    classification_values["training"]["ema_decay"] = average
    values = with_freeze(classification_values, freeze, checkpointing="full")
    run_training(values, tmp_path / "whole")
    run_training(values, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "complete").unlink()
    run_training(values, tmp_path / "cut", resume="auto")
    whole, again = (
        read_model(tmp_path / name / "checkpoints" / "step-00000008") for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_groups_leave_frozen_weights_out_and_keep_their_factors(
    classification_values: dict[str, Any],
) -> None:
    stage = build_stage(with_freeze(classification_values, 1))
    settings = stage.recipe.training.optimizer
    everything = parameter_groups(stage.module, settings)
    factors = {name: one.lr_factor for one in everything for name in one.names}
    stage.model.encoder.freeze(1)
    groups = parameter_groups(stage.module, settings)
    trained = {name: one.lr_factor for one in groups for name in one.names}
    assert trained == {
        name: factor
        for name, factor in factors.items()
        if not name.startswith(
            ("model.encoder.patch_", "model.encoder.stages.0.", "model.encoder.m")
        )
    }
    stage.model.encoder.freeze("all")
    groups = parameter_groups(stage.module, settings)
    assert sorted(name for one in groups for name in one.names) == [
        "model.head.bias",
        "model.head.weight",
    ]


def test_too_many_stages_are_refused_before_training(
    classification_values: dict[str, Any], encoder_directory: Path, pretrain_values: dict[str, Any]
) -> None:
    values = with_freeze(classification_values, 3)
    for start in ({}, {"init": str(encoder_directory)}):
        with pytest.raises(ValueError, match=r"optimizer\.freeze is 3, .* has 2 stages"):
            build_stage(values | start)
    with pytest.raises(ValueError, match="freeze belongs to fine-tuning"):
        parse(PretrainRecipe, with_freeze(pretrain_values, 1), "test")


@pytest.mark.parametrize("freeze", [1, "all"])
def test_sharded_ranks_train_the_same(tmp_path: Path, freeze: int | str) -> None:
    program = str(Path(__file__).parents[1] / "engine" / "distributed" / "train_frozen.py")
    text = finish([program, json.dumps(freeze)], tmp_path / "log", ranks=2)
    (line,) = [line for line in text.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["frozen"] == 0
    assert found["trained"] < 1e-5 < 1e-4 < found["moved"]


def seconds(step: Any) -> float:
    step()
    times = []
    for _ in range(5):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return min(times)


def test_a_head_alone_trains_at_the_speed_of_inference(
    classification_values: dict[str, Any],
) -> None:
    values = with_freeze(classification_values, "all")
    values["encoder"] |= {"embed_dim": 64, "num_heads": [2, 4], "depths": [2, 6]}
    stage = build_stage(values)
    batch = next(iter(stage.batches(rank=0, world=1, start=0, end=8)))
    module: nn.Module = stage.module

    def trained() -> None:
        loss: Tensor = module.train()(batch)
        loss.backward()

    def inferred() -> None:
        with torch.no_grad():
            module.eval()(batch)

    whole = seconds(trained)
    stage.model.encoder.freeze("all")
    head, inference = seconds(trained), seconds(inferred)
    assert head < 1.5 * inference
    assert head < whole / 1.5
    assert stage.watch.flops_per_sample == stage.flops_per_sample // 3
