"""Every recipe in jobs/ is one that its command accepts, and says what FACTS say."""

from pathlib import Path

import pytest

from simmim.recipe import load, parse, read_values, to_values
from simmim.stages.classification import ClassificationRecipe
from simmim.stages.pretrain import PretrainRecipe
from simmim.stages.probe import ProbeRecipe

JOBS = Path(__file__).parents[1] / "jobs"
TYPES = {
    "pretrain": PretrainRecipe,
    "classification": ClassificationRecipe,
    "probe": ProbeRecipe,
}
RECIPES = sorted(path for path in JOBS.glob("*/*.yaml") if path.parent.name != "accelerate")
PAPER = {
    # variant, window, epochs, batch, lr, schedule, weight decay, clip, drop path
    "base-100ep": ("base", 6, 100, 2048, 8e-4, "cosine", 0.05, 5, 0),
    "base-800ep": ("base", 12, 800, 2048, 4e-4, "multistep", 0.05, 5, 0.1),
    "large-800ep": ("large", 12, 800, 2048, 4e-4, "multistep", 0.05, 5, 0),
    "giant-70m": ("giant", 12, 20, 9216, 1.4e-3, "cosine", 0.1, 100, 0),
}


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {*PAPER, "huge-800ep", "base-224", "cifar10"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_recipe_is_valid_and_survives_being_written_out(path: Path) -> None:
    recipe_type = TYPES[read_values(path)["task"]]
    recipe = load(recipe_type, path)
    assert parse(recipe_type, to_values(recipe), "again") == recipe


@pytest.mark.parametrize("name", PAPER)
def test_pretraining_recipes_are_the_papers(name: str) -> None:
    recipe = load(PretrainRecipe, JOBS / "pretrain" / f"{name}.yaml")
    training = recipe.training
    assert PAPER[name] == (
        recipe.encoder.variant,
        recipe.encoder.window_size,
        training.epochs,
        training.batch_size,
        training.optimizer.lr,
        training.schedule.kind,
        training.optimizer.weight_decay,
        training.clip_norm,
        recipe.encoder.drop_path,
    )
    assert (recipe.data.image_size, recipe.mask.cell, recipe.mask.ratio) == (192, 32, 0.6)
    assert recipe.data.scale == (0.67, 1.0)
    assert training.optimizer.betas == (0.9, 0.999)
    assert training.schedule.warmup_lr == pytest.approx(5e-7 * training.batch_size / 512)


def test_the_fine_tuning_recipe_is_the_papers() -> None:
    recipe = load(ClassificationRecipe, JOBS / "finetune" / "base-224.yaml")
    training = recipe.training
    assert (recipe.data.image_size, recipe.encoder.window_size) == (224, 14)
    assert (training.epochs, training.batch_size, training.optimizer.lr) == (100, 2048, 5e-3)
    assert (training.optimizer.layer_decay, recipe.encoder.drop_path) == (0.75, 0.1)
    assert (training.schedule.warmup_epochs, training.schedule.min_lr) == (20, 1e-6)
