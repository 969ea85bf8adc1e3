"""Shards, checkpoints and encoder directories of an earlier version load and training continues.

`saved/` was written by version 0.1.0 before its modules moved: a set of shards, a pretraining and a
fine-tuning stopped at step 4 of 8, and an encoder directory of images and of clips.
`expected.json` is what that version went on to compute from them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import data_prep.cli
import simmim.cli
from simmim.engine.checkpoint.ema import RunningAverage, read_average
from simmim.engine.checkpoint.resume import load_optimizer
from simmim.engine.run import RunFolder
from simmim.recipe import load, read_values
from simmim.tasks.all_tasks import task_named
from simmim.tasks.loading import with_recorded_slots
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from swinv2 import load_encoder, load_video_encoder

SAVED = Path(__file__).parent / "saved"
EXPECTED: dict[str, Any] = json.loads((SAVED / "expected.json").read_text())


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the saved files, as the current folder: their recipes name relative paths."""
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_losses(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {str(line["step"]): line["loss"] for line in lines if "loss" in line}


def test_shards_verify(saved: Path) -> None:
    assert data_prep.cli.main(["verify", str(saved / "shards"), "--deep"]) == 0


@pytest.mark.parametrize(
    ("command", "recipe", "run"),
    [("pretrain", "pretrain.yaml", "pretraining"), ("finetune", "finetune.yaml", "finetuning")],
)
def test_runs_resume_to_the_same_losses(saved: Path, command: str, recipe: str, run: str) -> None:
    code = simmim.cli.main([command, "--config", recipe, "--folder", run, "--resume", "auto"])
    assert code == 0
    assert read_losses(saved / run) == pytest.approx(EXPECTED[run], rel=1e-4)


def test_averages_of_the_weights_resume(saved: Path) -> None:
    path = saved / "pretraining" / "checkpoints" / "step-00000004"
    stage = PretrainStage(load(PretrainRecipe, saved / "pretrain.yaml"))
    groups = [{"params": list(stage.module.named_parameters())}]
    optimizer = torch.optim.AdamW(groups)  # type: ignore[arg-type]
    load_optimizer(path, optimizer)
    average = RunningAverage(optimizer)
    average.load(path)
    assert all("ema" not in state for state in optimizer.state.values())
    saved_averages = read_average(path)
    assert saved_averages.keys() == dict(stage.module.named_parameters()).keys()
    with average.swapped():
        for name, parameter in stage.module.named_parameters():
            assert torch.equal(parameter, saved_averages[name])


@pytest.mark.parametrize("resumes", ["checkpoint", "start"])
def test_a_run_keeps_its_slots_though_the_recipe_names_none(saved: Path, resumes: str) -> None:
    """Recipes of today need no slots; the run of before had a number, which orders its samples."""
    recipe = saved / "pretrain.yaml"
    recipe.write_text(recipe.read_text().replace("  slots: 2\n", ""))
    if resumes == "start":  # stopped before the first checkpoint
        shutil.rmtree(saved / "pretraining" / "checkpoints")
    command = ["pretrain", "--config", str(recipe), "--folder", "pretraining"]
    assert simmim.cli.main([*command, "--resume", "auto"]) == 0
    losses = read_losses(saved / "pretraining")
    assert losses == pytest.approx(EXPECTED["pretraining"], rel=1e-4)
    assert read_values(saved / "pretraining" / "recipe.yaml")["data"]["slots"] == 2


@pytest.mark.parametrize(
    ("task", "config", "slots"),
    [("pretrain", "pretrain.yaml", 64), ("video", "video.yaml", 8)],
)
def test_a_run_without_recorded_slots_had_the_default_of_its_version(
    saved: Path, task: str, config: str, slots: int
) -> None:
    values = read_values(saved / "pretrain.yaml")
    values["data"].pop("slots")
    values["training"]["batch_size"] = 64
    if task == "video":
        values = {name: values[name] for name in ("encoder", "training")}
        values |= {"task": "video", "data": {"clips": "clips"}}
    (saved / config).write_text(yaml.safe_dump(values))
    run = RunFolder(path=saved / "run")
    run.path.mkdir()
    shutil.copy(saved / config, run.recipe)
    recipe = load(task_named(task, saved / config).recipe, saved / config)
    assert with_recorded_slots(recipe, run, None).data.slots is None
    assert with_recorded_slots(recipe, run, "auto").data.slots == slots


@torch.no_grad()
def test_encoder_directories_load(saved: Path) -> None:
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    features = load_encoder(saved / "pretraining" / "encoder")(image).flatten()[:64]
    torch.testing.assert_close(
        features, torch.tensor(EXPECTED["image_features"]), atol=1e-4, rtol=1e-4
    )
    clip = torch.linspace(-1, 1, 4 * 3 * 16 * 16).reshape(1, 4, 3, 16, 16)
    features = load_video_encoder(saved / "video")(clip).flatten()[:64]
    torch.testing.assert_close(
        features, torch.tensor(EXPECTED["clip_features"]), atol=1e-4, rtol=1e-4
    )


def test_checkpoints_export(saved: Path) -> None:
    checkpoint = saved / "pretraining" / "checkpoints" / "step-00000004"
    code = simmim.cli.main(["export", str(checkpoint), str(saved / "exported")])
    assert code == 0
    assert load_encoder(saved / "exported").config.embed_dim == 8
