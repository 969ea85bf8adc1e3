from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data_prep.cli
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batch import Batch
from simmim.data.transforms.mixing import draw_mixes, mix, partners
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import TrainingResult, train
from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, parse
from simmim.tasks.classification.classifier import copy_head, load_classifier, save_head
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.features import sample_drop_path_noise
from simmim.tasks.metrics import accuracy_sums
from swinv2.config_file import read_encoder_config
from swinv2.weights import load_encoder


def build_stage(values: dict[str, Any]) -> ClassificationStage:
    return ClassificationStage(parse(ClassificationRecipe, values, "test"))


def run_training(
    stage: ClassificationStage, folder: Path, resume: str | None = None
) -> TrainingResult:
    return train(stage, RunFolder(path=folder), build_accelerator("fp32"), resume)


def changed(values: dict[str, Any], section: str, **settings: Any) -> dict[str, Any]:
    return values | {section: values[section] | settings}


def make_shards(folder: Path, names: list[str]) -> Path:
    """Write shards of one image for each path under `folder`."""
    for name in names:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), len(name), dtype=np.uint8)).save(path)
    command = ["shard", str(folder / "images"), str(folder / "shards"), "--samples-per-shard", "4"]
    assert data_prep.cli.main(command) == 0
    return folder / "shards"


def test_training_from_scratch_learns_the_classes(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    values = changed(classification_values, "training", steps=60, validate_every=60)
    stage = build_stage(values)
    before = stage.validate(build_accelerator("fp32"))
    after = run_training(stage, tmp_path / "run").figures
    assert after["top1"] >= 60
    assert "top5" not in after  # of three classes
    assert after["validation_loss"] < before["validation_loss"]


def test_top5_is_measured_of_more_than_five_classes(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    names = [f"{kind * (number + 1)}/{kind}.png" for kind in "ab" for number in range(6)]
    for count in (5, 6):
        kept = [name for name in names if len(name.split("/")[0]) <= count and name[0] == "a"]
        shards = make_shards(tmp_path / str(count), [*kept, *(f"{one[:-5]}b.png" for one in kept)])
        values = changed(classification_values, "data", shards=str(shards), slots=1)
        figures = build_stage(values).validate(build_accelerator("fp32"))
        assert ("top5" in figures) == (count > 5)


def test_the_run_exports_what_was_trained(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    stage = build_stage(classification_values)
    run_training(stage, tmp_path / "run")
    trained = load_classifier(tmp_path / "run" / "encoder", tmp_path / "run" / "classifier")
    assert trained.classes == ("circle", "square", "stripe")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(trained.model(images), stage.model.eval()(images))
    provenance = read_encoder_config(tmp_path / "run" / "encoder").provenance
    assert (provenance.step, provenance.samples_seen) == (8, 64)


def test_a_resumed_run_equals_an_uninterrupted_one(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(build_stage(classification_values), tmp_path / "whole")
    run_training(build_stage(classification_values), tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "complete").unlink()
    resumed = build_stage(classification_values)
    run_training(resumed, tmp_path / "cut", resume="auto")
    whole = load_encoder(tmp_path / "whole" / "encoder").state_dict()
    again = load_encoder(tmp_path / "cut" / "encoder").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_directory_provides_weights_sizes_and_normalisation(
    classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    other = changed(classification_values, "encoder", embed_dim=32, num_heads=[2, 4], window_size=8)
    values = changed(other, "data", image_size=32) | {"init": str(encoder_directory)}
    stage = build_stage(values)
    config = stage.model.encoder.config
    assert (config.embed_dim, config.num_heads) == (16, (1, 2))
    assert (config.image_size, config.window_size, config.drop_path) == ((32, 32), (8, 8), 0.1)
    assert config.pretrained_window_sizes == ((4, 4), (4, 4))
    assert stage.initial.mean == (0.4, 0.5, 0.6)
    saved = load_encoder(encoder_directory).state_dict()
    assert all(
        torch.equal(saved[name], part) for name, part in stage.model.encoder.state_dict().items()
    )


def test_fine_tuning_at_other_sizes_keeps_the_pretrained_windows(
    classification_values: dict[str, Any], encoder_directory: Path, tmp_path: Path
) -> None:
    values = changed(classification_values, "training", steps=2, validate_every=2)
    start, first = encoder_directory, read_encoder_config(encoder_directory).config
    for image_size, window_size in ((24, 6), (32, 8)):
        run = tmp_path / f"at-{image_size}"
        sized = changed(values, "encoder", window_size=window_size)
        stage = build_stage(changed(sized, "data", image_size=image_size) | {"init": str(start)})
        run_training(stage, run)
        start = run / "encoder"
        handed_on, trained = load_encoder(start), stage.model.encoder.eval()
        assert handed_on.config == replace(
            first, image_size=image_size, window_size=window_size, drop_path=0.1
        )
        images = torch.randn(1, 3, image_size, image_size)
        with torch.no_grad():
            assert torch.equal(handed_on(images), trained(images))
    assert first.pretrained_window_sizes == ((4, 4), (4, 4))
    assert load_encoder(start, image_size=16, window_size=4, drop_path=0).config == first


def test_initial_weights_depend_on_the_seed_alone(classification_values: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    one, two = build_stage(classification_values), build_stage(classification_values)
    other = build_stage(changed(classification_values, "training", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [stage.model.state_dict() for stage in (one, two, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def test_a_fraction_is_the_same_share_of_each_class_for_every_start(
    classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    values = changed(classification_values, "data", fraction=0.5)
    scratch = build_stage(values)
    pretrained = build_stage(changed(values, "training", seed=9) | {"init": str(encoder_directory)})
    whole = build_stage(classification_values).training_shards

    def drawn(shards: ShardSet) -> list[tuple[str, int | None]]:
        samples = [shards.read(s, i) for s, size in enumerate(shards.sizes) for i in range(size)]
        return [(sample.name, sample.label) for sample in samples]

    assert drawn(scratch.training_shards) == drawn(pretrained.training_shards)
    assert set(drawn(scratch.training_shards)) < set(drawn(whole))
    for label in range(3):
        kept, all_of_it = (
            sum(found == label for _, found in drawn(shards))
            for shards in (scratch.training_shards, whole)
        )
        assert kept == round(all_of_it / 2)
    assert scratch.validation_shards is not None
    assert scratch.validation_shards.samples == 24


def test_validation_counts_every_image_once(classification_values: dict[str, Any]) -> None:
    # 24 images in batches of 8 and of 16, which leaves a part of a batch at the end.
    figures = []
    for batch_size in (8, 16):
        stage = build_stage(changed(classification_values, "training", batch_size=batch_size))
        stage.module.eval()
        figures.append(stage.validate(build_accelerator("fp32")))
    assert figures[0]["top1"] == figures[1]["top1"]
    assert figures[0]["validation_loss"] == pytest.approx(figures[1]["validation_loss"], rel=1e-6)


def test_no_held_out_shards_no_metrics(classification_values: dict[str, Any]) -> None:
    stage = build_stage(changed(classification_values, "data", validation_shards=0))
    assert stage.validate(build_accelerator("fp32")) == {}


def test_loss_is_smoothed_cross_entropy(classification_values: dict[str, Any]) -> None:
    stage = build_stage(classification_values | {"label_smoothing": 0.3})
    batch = next(iter(stage.batches(rank=0, world=1, start=0, end=8)))
    stage.module.eval()
    pixels = batch.images / 255
    pixels[batch.flips] = pixels[batch.flips].flip(-1)
    mean, std = (
        torch.tensor(part).view(3, 1, 1) for part in (stage.initial.mean, stage.initial.std)
    )
    logs = stage.model((pixels - mean) / std).log_softmax(dim=1)
    target = F.one_hot(batch.labels, 3) * 0.7 + 0.3 / 3
    expected = -(target * logs).sum(dim=1).mean()
    torch.testing.assert_close(stage.module(batch), expected)


def test_scores_add_up() -> None:
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5], [5.0, 4, 3, 2, 1, 0]])
    labels = torch.tensor([5, 5])
    whole = accuracy_sums(logits, labels)
    assert (whole.top1, whole.top5, whole.samples) == (1, 1, 2)
    parts = accuracy_sums(logits[:1], labels[:1]) + accuracy_sums(logits[1:], labels[1:])
    assert replace(parts, loss=0) == replace(whole, loss=0)
    assert parts.loss == pytest.approx(whole.loss)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("data", {"fraction": 0.0}, "data.fraction is 0.0"),
        ("data", {"crop_pct": 1.5}, "data.crop_pct is 1.5"),
        ("data", {"slots": 3}, "multiple of data.slots 3"),
        ("data", {"mean": [0.5], "std": [0.5]}, "data.mean has 1 value"),
        ("data", {"validatoin": "x"}, "did you mean validation"),
    ],
)
def test_impossible_recipes_are_refused(
    classification_values: dict[str, Any], section: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(ClassificationRecipe, changed(classification_values, section, **settings), "test")


def test_an_init_without_an_encoder_is_refused(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        build_stage(classification_values | {"init": str(tmp_path / "nowhere")})


def test_shards_without_classes_are_refused(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    shards = make_shards(tmp_path, [f"only/{number}.png" for number in range(16)])
    with pytest.raises(ValueError, match="at least 2"):
        build_stage(changed(classification_values, "data", shards=str(shards)))


def test_samples_without_a_class_are_refused(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    names = [f"{folder}{number}.png" for folder in ("", "a/", "b/") for number in range(6)]
    shards = make_shards(tmp_path, names)
    with pytest.raises(ValueError, match="have no class"):
        build_stage(changed(classification_values, "data", shards=str(shards), validation_shards=0))


def test_validation_shards_of_other_classes_are_refused(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    names = [f"{name}/{number}.png" for name in ("circle", "cone") for number in range(8)]
    other = make_shards(tmp_path, names)
    with pytest.raises(ValueError, match=r"only in the first: square, stripe; .*second: cone"):
        build_stage(changed(classification_values, "data", validation=str(other)))


def test_validation_shards_of_their_own_are_used_whole(
    classification_values: dict[str, Any], shards: Path
) -> None:
    stage = build_stage(changed(classification_values, "data", validation=str(shards)))
    assert stage.validation_shards is not None
    assert stage.training_shards.samples == stage.validation_shards.samples == 96


def test_training_mixes_images_and_validation_does_not(
    classification_values: dict[str, Any],
) -> None:
    paper = {"rand_magnitude": 9, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}
    stage = build_stage(classification_values | {"augmentation": paper, "label_smoothing": 0.1})
    batch = next(iter(stage.batches(rank=0, world=1, start=0, end=8)))
    module = stage.module.train()
    loss = module(batch)
    mixes = draw_mixes(stage.recipe.augmentation, 0, batch.addresses, (16, 16))
    images = mix(module.normalise(batch.images, batch.flips), mixes)
    noise = sample_drop_path_noise(stage.model.encoder, batch, 0)
    targets = F.one_hot(batch.labels, 3).float()
    shares = mixes.shares[:, None]
    soft = shares * targets + (1 - shares) * partners(targets)
    logs = stage.model(images, noise).log_softmax(dim=1)
    expected = -((0.9 * soft + 0.1 / 3) * logs).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected)
    assert 0 < float(mixes.shares.min()) < 1
    module.eval()
    plain = module(batch)
    logits = stage.model(module.normalise(batch.images, batch.flips))
    torch.testing.assert_close(plain, F.cross_entropy(logits, batch.labels, label_smoothing=0.1))


def test_augmented_batches_are_the_same_on_two_ranks(classification_values: dict[str, Any]) -> None:
    paper = {"rand_magnitude": 9, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}
    stage = build_stage(classification_values | {"augmentation": paper})
    module = stage.module
    whole = next(iter(stage.batches(rank=0, world=1, start=0, end=8)))
    parts = [next(iter(stage.batches(rank=rank, world=2, start=0, end=8))) for rank in range(2)]

    def seen(batch: Batch) -> torch.Tensor:
        mixes = draw_mixes(stage.recipe.augmentation, 0, batch.addresses, (16, 16))
        return mix(module.normalise(batch.images, batch.flips), mixes)

    assert torch.equal(seen(whole), torch.cat([seen(part) for part in parts]))


def test_odd_micro_batches_cannot_be_mixed(classification_values: dict[str, Any]) -> None:
    values = changed(classification_values, "training", accumulation=8)
    stage = build_stage(values | {"augmentation": {"mixup": 0.8}})
    with pytest.raises(ValueError, match="even micro-batch"):
        stage.batches(rank=0, world=1, start=0, end=8)


def test_a_chain_of_runs_keeps_the_head_if_it_has_the_classes(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(build_stage(classification_values), tmp_path / "first")
    trained = load_classifier(tmp_path / "first" / "encoder", tmp_path / "first" / "classifier")
    again = build_stage(classification_values | {"init": str(tmp_path / "first")})
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    fewer = changed(classification_values, "data", classes=["stripe", "circle"])
    some = build_stage(fewer | {"init": str(tmp_path / "first")})
    rows = [trained.classes.index(name) for name in some.classes]
    assert torch.equal(some.model.head.weight, trained.model.head.weight[rows])
    encoder_alone = build_stage(fewer | {"init": str(tmp_path / "first" / "encoder")})
    assert not torch.equal(encoder_alone.model.head.weight, some.model.head.weight)


def test_a_head_of_other_classes_is_not_copied(tmp_path: Path) -> None:
    trained = torch.nn.Linear(4, 2)
    save_head(trained, tmp_path / "classifier", ["cat", "dog"])
    head = torch.nn.Linear(4, 2)
    before = head.weight.detach().clone()
    assert not copy_head(head, ["cat", "horse"], tmp_path / "classifier")
    assert torch.equal(head.weight, before)
    assert copy_head(head, ["dog", "cat"], tmp_path / "classifier")
    assert torch.equal(head.weight, trained.weight[[1, 0]])
    with pytest.raises(ValueError, match="head for 4 features, and the encoder has 5"):
        copy_head(torch.nn.Linear(5, 1), ["dog"], tmp_path / "classifier")


def test_an_unfinished_init_run_comes_with_a_remedy(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(build_stage(classification_values), tmp_path / "run")
    (tmp_path / "run" / "encoder").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="simmim export"):
        build_stage(classification_values | {"init": str(tmp_path / "run")})
