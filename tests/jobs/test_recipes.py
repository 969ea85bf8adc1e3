"""Every recipe in jobs/ is valid, builds its model, and has the papers' settings."""

import json
import re
from pathlib import Path

import pytest
import torch

from simmim.bench.choices import GIB
from simmim.cli import main
from simmim.recipe import load, parse, read_values, to_values
from simmim.tasks.classification.classifier import Classifier
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.detection.heads import build_detector
from simmim.tasks.detection.recipe import DetectionRecipe
from simmim.tasks.pretrain.model import build_model
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.probe.recipe import ProbeRecipe
from simmim.tasks.segmentation.heads import build_segmenter
from simmim.tasks.segmentation.recipe import SegmentationRecipe
from swinv2 import VARIANTS, build_encoder

JOBS = Path(__file__).parents[2] / "jobs"
TYPES = {
    "pretrain": PretrainRecipe,
    "classification": ClassificationRecipe,
    "probe": ProbeRecipe,
    "segmentation": SegmentationRecipe,
    "detection": DetectionRecipe,
}
RECIPES = sorted(
    path
    for task in ("pretrain", "finetune", "probe")
    for path in (JOBS / task).glob("*.yaml")
    if not path.stem.startswith("video-")  # test_video_recipes.py
)
SMALL = {
    "pretrain": {"cifar10", "cifar10-hour", "camvid", "stream"},
    "finetune": {
        "cifar10",
        "cifar10-labels",
        "cifar10-few-labels",
        "detection-camvid",
        "segmentation-camvid",
    },
}
DENSE = {"giant-ade20k", "giant-coco"}
CONTINUED = {"continue"}
FULL_SCALE = [
    path
    for path in RECIPES
    if path.stem not in DENSE | CONTINUED | SMALL["pretrain"] | SMALL["finetune"]
]
PRETRAINING = {
    # variant, window, epochs, batch, lr, schedule, weight decay, clip, drop path
    "tiny-800ep": ("tiny", 12, 800, 2048, 4e-4, "multistep", 0.05, 5, 0),
    "small-800ep": ("small", 12, 800, 2048, 4e-4, "multistep", 0.05, 5, 0.1),
    "base-100ep": ("base", 6, 100, 2048, 8e-4, "cosine", 0.05, 5, 0),
    "base-800ep": ("base", 12, 800, 2048, 4e-4, "multistep", 0.05, 5, 0.1),
    "large-800ep": ("large", 12, 800, 2048, 4e-4, "multistep", 0.05, 5, 0),
    "huge-800ep": ("huge", 12, 800, 2048, 4e-4, "multistep", 0.05, 5, 0),
    "giant-70m": ("giant", 12, 20, 9216, 1.4e-3, "cosine", 0.1, 100, 0),
}
FINE_TUNING = {
    # variant, image, window, epochs, batch, lr, warm-up (epochs, steps), layer decay, drop path
    "tiny-224": ("tiny", 224, 14, 100, 2048, 5e-3, (20, 0), 0.75, 0.1),
    "small-224": ("small", 224, 14, 100, 2048, 5e-3, (20, 0), 0.75, 0.1),
    "base-224": ("base", 224, 14, 100, 2048, 5e-3, (20, 0), 0.75, 0.1),
    "base-384": ("base", 384, 24, 100, 2048, 5e-3, (20, 0), 0.75, 0.1),
    "large-224": ("large", 224, 14, 100, 2048, 5e-3, (20, 0), 0.7, 0.2),
    "large-384": ("large", 384, 24, 100, 2048, 5e-3, (20, 0), 0.7, 0.2),
    "huge-224": ("huge", 224, 14, 100, 2048, 5e-3, (20, 0), 0.7, 0.2),
    "giant-intermediate": ("giant", 192, 12, 30, 9216, 1.4e-3, (0, 20_000), 0.87, 0.3),
    "giant-640": ("giant", 640, 40, 10, 576, 2.1e-5, (2, 0), 1.0, 0.5),
}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_all_variants_have_recipes() -> None:
    folders = {path.parent for path in RECIPES}
    found = {
        folder.name: {path.stem for path in RECIPES if path.parent == folder} for folder in folders
    }
    assert found["pretrain"] == {*PRETRAINING, *CONTINUED, *SMALL["pretrain"]}
    assert found["finetune"] == {*FINE_TUNING, *DENSE, *SMALL["finetune"]}
    for table in (PRETRAINING, FINE_TUNING):
        assert {row[0] for row in table.values()} == set(VARIANTS)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_each_recipe_is_valid_and_round_trips(path: Path) -> None:
    recipe_type = TYPES[read_values(path)["task"]]
    recipe = load(recipe_type, path)
    assert parse(recipe_type, to_values(recipe), "again") == recipe


@pytest.mark.parametrize("path", FULL_SCALE, ids=name)
def test_each_model_can_be_built(path: Path) -> None:
    with torch.device("meta"):
        if path.parent.name == "pretrain":
            pretraining = load(PretrainRecipe, path)
            encoder, execution = build_model(pretraining).encoder, pretraining.execution
        else:
            recipe = load(ClassificationRecipe, path)
            encoder, execution = (
                build_encoder(recipe.encoder.config(recipe.data.image_size)),
                recipe.execution,
            )
            Classifier(encoder, 1000)
    execution.apply(encoder)
    assert encoder.config.variant == path.stem.split("-")[0]
    window = encoder.config.window_size[0]
    assert encoder.config.image_size[0] // encoder.config.patch_size % window == 0


@pytest.mark.parametrize("path", FULL_SCALE, ids=name)
def test_the_global_batch_divides_over_the_hardware_in_the_header(path: Path) -> None:
    comment = path.read_text()
    named = re.search(r"^# Hardware: (\d+) GPUs", comment, re.MULTILINE)
    micro_batch = re.search(r"(\d+) images per\s+#?\s*micro-batch", comment)
    assert named is not None
    assert micro_batch is not None
    recipe = load(TYPES[read_values(path)["task"]], path)
    gpus, training = int(named[1]), recipe.training
    assert recipe.data.slots is None
    assert training.batch_size == gpus * training.accumulation * int(micro_batch[1])
    assert path.parent.name == "pretrain" or int(micro_batch[1]) % 2 == 0  # mixup takes pairs


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_recipes_have_the_papers_settings(name: str) -> None:
    recipe = load(PretrainRecipe, JOBS / "pretrain" / f"{name}.yaml")
    training = recipe.training
    assert PRETRAINING[name] == (
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


def test_domain_pretraining_continues_the_published_base_gently() -> None:
    recipe = load(PretrainRecipe, JOBS / "pretrain" / "continue.yaml")
    scratch = load(PretrainRecipe, JOBS / "pretrain" / "base-800ep.yaml")
    assert recipe.encoder.config(192) == scratch.encoder.config(192)
    assert (recipe.mask, recipe.loss) == (scratch.mask, scratch.loss)
    training, schedule = recipe.training, recipe.training.schedule
    per_image = scratch.training.optimizer.lr / scratch.training.batch_size
    assert training.optimizer.lr == pytest.approx(per_image * training.batch_size / 4)
    assert schedule.warmup_epochs > 0
    assert schedule.warmup_lr < training.optimizer.lr / 100
    header = (JOBS / "pretrain" / "continue.yaml").read_text()
    assert "--init-from encoders/simmim-base" in header


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_recipes_have_the_papers_settings(name: str) -> None:
    recipe = load(ClassificationRecipe, JOBS / "finetune" / f"{name}.yaml")
    training, schedule = recipe.training, recipe.training.schedule
    assert FINE_TUNING[name] == (
        recipe.encoder.variant,
        recipe.data.image_size,
        recipe.encoder.window_size,
        training.epochs,
        training.batch_size,
        training.optimizer.lr,
        (schedule.warmup_epochs, schedule.warmup_steps),
        training.optimizer.layer_decay,
        recipe.encoder.drop_path,
    )
    assert (schedule.kind, schedule.warmup_lr, schedule.min_lr) == ("cosine", 1e-6, 1e-6)
    augmentation = recipe.augmentation
    assert (augmentation.rand_magnitude, augmentation.rand_std) == (9, 0.5)
    assert (augmentation.color_jitter, augmentation.erasing) == (0.4, 0.25)
    assert (augmentation.mixup, augmentation.cutmix) == (0.8, 1.0)
    assert (augmentation.mix_probability, augmentation.mix_switch) == (1, 0.5)
    assert recipe.label_smoothing == 0.1


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_starts_from_the_output_of_another_recipe(name: str) -> None:
    recipe = load(ClassificationRecipe, JOBS / "finetune" / f"{name}.yaml")
    root, run, *encoder = recipe.init.split("/")
    # The folder of a fine-tuning run brings its head as well.
    assert (root, encoder) == ("runs", ["encoder"] if run in PRETRAINING else [])
    assert run in {*PRETRAINING, *FINE_TUNING}
    (path,) = JOBS.glob(f"*/{run}.yaml")
    assert read_values(path)["encoder"]["variant"] == recipe.encoder.variant


def test_the_ade20k_recipe_has_the_papers_settings() -> None:
    recipe = load(SegmentationRecipe, JOBS / "finetune" / "giant-ade20k.yaml")
    training, schedule = recipe.training, recipe.training.schedule
    assert (recipe.encoder.variant, recipe.encoder.window_size) == ("giant", 40)
    assert (recipe.data.image_size, recipe.encoder.drop_path) == (640, 0.4)
    assert (recipe.evaluation.size, recipe.evaluation.window_size) == (896, 56)
    assert recipe.data.short_side is not None
    assert [recipe.data.short_side * scale for scale in recipe.evaluation.scales] == [896]
    assert (training.steps, training.batch_size, training.optimizer.lr) == (80_000, 32, 4e-5)
    assert (schedule.kind, schedule.warmup_steps) == ("linear", 750)
    assert (recipe.data.num_classes, recipe.data.reduce_zero_label) == (150, True)


def test_the_coco_recipe_has_the_papers_settings() -> None:
    recipe = load(DetectionRecipe, JOBS / "finetune" / "giant-coco.yaml")
    training = recipe.training
    assert (recipe.encoder.variant, recipe.encoder.window_size) == ("giant", 32)
    assert recipe.data.image_size == 1536
    assert (training.steps, training.batch_size, training.optimizer.lr) == (45_000, 96, 6e-4)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_each_dense_model_can_be_built(name: str) -> None:
    pytest.importorskip("transformers", reason="needs simmim[finetune]")
    path = JOBS / "finetune" / f"{name}.yaml"
    with torch.device("meta"):
        if read_values(path)["task"] == "segmentation":
            recipe = load(SegmentationRecipe, path)
            encoder = build_encoder(recipe.encoder.config(recipe.data.image_size))
            model = build_segmenter(encoder, recipe.data.names, recipe.head)
            recipe.execution.apply(model.backbone.encoder)
        else:
            objects = load(DetectionRecipe, path)
            encoder = build_encoder(objects.encoder.config(objects.data.image_size))
            found = build_detector(encoder, [str(one) for one in range(80)], objects.head)
            objects.execution.apply(found.backbone.encoder)
    assert encoder.config.variant == "giant"


ESTIMATE = re.compile(r"([\d.]+) GiB per GPU.*?`simmim (bench memory [^`]*)`")


def estimate_in_header(path: Path) -> tuple[float, list[str]]:
    """Return the memory of a GPU in GiB, and the arguments of the command that estimates it."""
    comments = [line.lstrip("# ") for line in path.read_text().splitlines() if line[:1] == "#"]
    found = ESTIMATE.search(" ".join(comments))
    assert found is not None
    return float(found[1]), found[2].split()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem == "tiny-800ep" else pytest.mark.slow)
        for path in FULL_SCALE
    ],
    ids=name,
)
def test_the_memory_in_the_header_is_that_of_the_command(path: Path, tmp_path: Path) -> None:
    memory, arguments = estimate_in_header(path)
    recipe = load(TYPES[read_values(path)["task"]], path)
    file = tmp_path / "memory.json"
    if "--checkpointing" not in arguments:
        arguments += ["--checkpointing", recipe.execution.checkpointing]
    if "--devices" not in arguments:
        arguments += ["--devices", "1"]
    assert main([*arguments, "--no-measure", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    case, encoder = row["case"], recipe.encoder
    assert (case["variant"], case["window_size"]) == (encoder.variant, encoder.window_size)
    assert (case["image_size"], case["precision"]) == (recipe.data.image_size, "bf16")
    assert case["checkpointing"] == recipe.execution.checkpointing
    assert (case["attention"], case["compiled"]) == (recipe.execution.attention, True)
    assert recipe.execution.compile == "auto"
    *_, need = row["needs"].values()
    assert memory == pytest.approx(need["total"] / GIB, abs=0.006)
