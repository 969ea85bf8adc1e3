"""Pretraining on mixtures, arrays and damaged images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from simmim.data.order.source import DataError
from simmim.engine.run import RunFolder
from simmim.recipe import parse, to_values
from simmim.tasks.features import Normalise
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.train import train_recipe
from tests.simmim.data.conftest import WriteShards, encode
from tests.simmim.data.measured import write_measured


def pretrain(values: dict[str, Any], path: Path, resume: str | None = None) -> RunFolder:
    AcceleratorState._reset_state(reset_partial_state=True)
    run = RunFolder(path=path)
    recipe = parse(PretrainRecipe, values, "test")
    train_recipe(PretrainStage, recipe, run=run, resume=resume, allow_changes=False)
    return run


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


def pictures(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [encode(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def test_a_resumed_mixture_equals_an_uninterrupted_one(
    pretrain_values: dict[str, Any],
    write_shards: WriteShards,
    tmp_path: Path,
) -> None:
    other = write_shards([12, 12], images=pictures(24), name="other")
    listed = [{"shards": pretrain_values["data"]["shards"], "weight": 3}, {"shards": str(other)}]
    pretrain_values["data"]["shards"] = listed
    whole = pretrain(pretrain_values, tmp_path / "whole")
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    batches = list(stage.batches(rank=0, world=1, start=0, end=96))
    second = sum(int((batch.addresses[:, 1] >= 7).sum()) for batch in batches)
    assert abs(second - 24) <= 2
    part = pretrain(pretrain_values, tmp_path / "part")
    for step in (8, 12):
        for path in part.checkpoints.glob(f"step-{step:08d}"):
            path.rename(tmp_path / f"gone-{step}")
    resumed = pretrain(pretrain_values, tmp_path / "part", resume="auto")
    assert losses(resumed) == losses(whole)


def array(rng: np.random.Generator, kind: str) -> bytes:
    buffer = io.BytesIO()
    values = rng.random((20, 24, 5)) * (65535 if kind == "uint16" else 1)
    np.save(buffer, values.astype(kind))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_arrays_of_five_channels_with_measured_statistics(
    kind: str,
    pretrain_values: dict[str, Any],
    write_shards: WriteShards,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    folder = write_shards([16, 8], images=[array(rng, kind) for _ in range(24)], extension="npy")
    pretrain_values["data"] |= {"shards": str(folder), "mean": "measured", "std": "measured"}
    pretrain_values["encoder"]["in_channels"] = 5
    recipe = parse(PretrainRecipe, pretrain_values, "test")
    with pytest.raises(ValueError, match=f"data-prep info {folder} --statistics"):
        PretrainStage(recipe)
    write_measured(folder, [0.5] * 5, [12**-0.5] * 5)
    stage = PretrainStage(recipe)
    assert to_values(stage.recipe)["data"]["mean"] == [0.5] * 5
    batch = next(iter(stage.batches(rank=0, world=1, start=0, end=8)))
    assert batch.images.dtype == getattr(torch, kind)
    normal = stage.module.normalise(batch.images, batch.flips)
    assert abs(float(normal.mean())) < 0.1
    assert 0.5 < float(normal.std()) < 1.1  # resizing smooths
    run = pretrain(pretrain_values, tmp_path / "run")
    pretrain(pretrain_values, tmp_path / "run", resume="auto")  # the recipe is still the same
    assert np.isfinite(losses(run)).all()
    assert json.loads((run.encoder / "config.json").read_text())["mean"] == [0.5] * 5


def test_damaged_images_are_replaced_and_named_in_the_run(
    pretrain_values: dict[str, Any],
    write_shards: WriteShards,
    tmp_path: Path,
) -> None:
    images = pictures(48)
    images[3], images[40] = b"nothing", images[40][:70]
    folder = write_shards([16, 16, 16], images=images)
    pretrain_values["data"] |= {"shards": str(folder), "workers": 1}
    run = pretrain(pretrain_values, tmp_path / "run")
    named = [json.loads(line) for line in run.bad_samples.read_text().splitlines()]
    assert {(one["kind"], one["key"]) for one in named} == {
        ("replaced", "000000003"),
        ("skipped", "002000008"),
    }
    assert len(named) == 2
    pretrain_values["data"]["max_bad_share"] = 0.0
    with pytest.raises(DataError, match=r"max_bad_share 0 allows.*bad_samples\.jsonl"):
        pretrain(pretrain_values, tmp_path / "strict")


def test_the_device_flips_and_scales() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    normalise = Normalise([0.5], [0.25])
    plain = normalise(images)
    torch.testing.assert_close(plain, (images / 255 - 0.5) / 0.25)
    flipped = normalise(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1], plain[1])
    wide = normalise((images.to(torch.int32) * 257).to(torch.uint16))
    torch.testing.assert_close(wide, plain)
    torch.testing.assert_close(normalise(images / 255), plain)
    last = images.contiguous(memory_format=torch.channels_last)
    assert normalise(last).is_contiguous()
