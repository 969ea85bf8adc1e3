"""Video recipes are valid, build their model, and have the paper's settings."""

from pathlib import Path

import pytest
import torch

from simmim.recipe import load, parse, read_values, to_values
from simmim.tasks.classification.classifier import Classifier
from simmim.tasks.video.recipe import VideoRecipe
from swinv2 import SwinV2, VideoSwinV2, inflate

JOBS = Path(__file__).parents[2] / "jobs"
RECIPES = sorted((JOBS / "finetune").glob("video-*.yaml"))
PAPER = {
    # variant, image, window, frames, window in time, epochs, warm-up epochs, lr, batch, GPUs
    "video-kinetics-256": ("giant", 256, 16, 8, 8, 20, 2.5, 3.6e-4, 80, 40),
    "video-kinetics-320": ("giant", 320, 20, 8, 8, 5, 1, 5e-5, 64, 32),
}


def test_both_stages_and_a_small_one_have_recipes() -> None:
    assert {path.stem for path in RECIPES} == {*PAPER, "video-tiny"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_valid_and_builds(path: Path) -> None:
    recipe = load(VideoRecipe, path)
    assert parse(VideoRecipe, to_values(recipe), "again") == recipe
    config = recipe.encoder.video_config(recipe.data.image_size, recipe.data.frames)
    with torch.device("meta"):
        encoder = VideoSwinV2(config)
        Classifier(encoder, 400)
    recipe.execution.apply(encoder)
    assert encoder.config.variant == recipe.encoder.variant
    rows = config.stage_resolutions[0][0]
    assert rows % config.window_size[0] == 0
    assert f"--config jobs/finetune/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_papers_settings(name: str) -> None:
    path = JOBS / "finetune" / f"{name}.yaml"
    recipe = load(VideoRecipe, path)
    training, schedule = recipe.training, recipe.training.schedule
    *numbers, gpus = PAPER[name]
    assert tuple(numbers) == (
        recipe.encoder.variant,
        recipe.data.image_size,
        recipe.encoder.window_size,
        recipe.data.frames,
        recipe.encoder.window_frames,
        training.epochs,
        schedule.warmup_epochs,
        training.optimizer.lr,
        training.batch_size,
    )
    assert f"Hardware: {gpus} GPUs" in path.read_text()
    assert recipe.data.slots is None
    assert training.batch_size == gpus * training.accumulation


def test_the_second_stage_starts_from_the_first() -> None:
    first, second = (read_values(JOBS / "finetune" / f"{name}.yaml") for name in PAPER)
    assert second["init"] == "runs/video-kinetics-256"
    run = first["init"].split("/")[1]
    assert (JOBS / "finetune" / f"{run}.yaml").is_file()


def test_an_image_encoder_is_inflated_on_the_meta_device() -> None:
    recipe = load(VideoRecipe, JOBS / "finetune" / "video-kinetics-256.yaml")
    with torch.device("meta"):
        encoder = inflate(SwinV2(recipe.encoder.config(256)))
    assert encoder.config.map_window == (8, 16, 16)
