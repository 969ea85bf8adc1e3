"""A run trains and records the architecture of its encoder; random weights are compared in it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import simmim.cli
from simmim.doctor.hyperparameters import check_learning_rate
from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, parse, read_values, to_yaml
from simmim.tasks.architecture import OF_VARIANT, overridden, resolve_architecture, settings_of
from simmim.tasks.classification.classifier import save_head
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.evaluate import evaluate
from simmim.tasks.label_efficiency import saw_labels
from simmim.tasks.recipe import EncoderSettings
from swinv2 import SwinV2, SwinV2Config, read_encoder_config, save_encoder
from swinv2.config import variant_config

ALL = ("patch_size", "in_channels", *OF_VARIANT)
OTHER = {"embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "patch_size": 4}
"""Sizes of a recipe that are not those of its encoder."""


@pytest.fixture
def other_values(classification_values: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose own encoder is not the one of `encoder_directory`."""
    return classification_values | {"encoder": classification_values["encoder"] | OTHER}


def recipe_of(values: dict[str, Any]) -> ClassificationRecipe:
    return parse(ClassificationRecipe, values, "test")


@pytest.mark.parametrize("given", ["tiny", "base", "giant"])
@pytest.mark.parametrize(
    "trained",
    [
        variant_config("tiny"),
        variant_config("huge", patch_size=2, in_channels=5),
        variant_config("base", mlp_ratio=2.0),
        SwinV2Config(embed_dim=24, depths=(1, 3), num_heads=(3, 6), extra_norm_every=2),
        SwinV2Config(embed_dim=128, depths=(2, 2), num_heads=(4, 8), in_channels=1, mlp_ratio=3.0),
    ],
    ids=["tiny", "huge", "base-wide", "extra-norms", "grey"],
)
def test_every_architecture_can_be_written_as_settings(given: str, trained: SwinV2Config) -> None:
    wanted = EncoderSettings(variant=given, window_size=7, drop_path=0.3, embed_dim=64)  # type: ignore[arg-type]
    config = settings_of(wanted, trained).config(224)
    assert {name: getattr(config, name) for name in ALL} == {
        name: getattr(trained, name) for name in ALL
    }
    assert config.variant == trained.variant
    assert (config.window_size, config.drop_path) == ((7, 7), 0.3)


def test_scratch_takes_the_architecture_that_it_is_compared_with(
    other_values: dict[str, Any], encoder_directory: Path
) -> None:
    pretrained = ClassificationStage(recipe_of(other_values | {"init": str(encoder_directory)}))
    scratch = ClassificationStage(recipe_of(other_values | {"like": str(encoder_directory)}))
    config = pretrained.encoder.config
    assert replace(scratch.encoder.config, pretrained_window_sizes=None) == replace(
        config, pretrained_window_sizes=None
    )
    assert config.embed_dim == 16
    assert scratch.initial.mean == pretrained.initial.mean == (0.4, 0.5, 0.6)
    assert scratch.initial.std == pretrained.initial.std == (0.2, 0.25, 0.3)
    assert scratch.recipe == replace(pretrained.recipe, init="scratch")
    # The recorded recipe of the one, from scratch, is the other.
    again = recipe_of(yaml.safe_load(to_yaml(pretrained.recipe)) | {"init": "scratch"})
    assert ClassificationStage(again).recipe == scratch.recipe


@pytest.mark.parametrize("start", ["init", "like"])
def test_trained_weights_need_no_section_that_describes_the_encoder(
    start: str, classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    described = ClassificationStage(
        recipe_of(classification_values | {start: str(encoder_directory)})
    )
    del classification_values["encoder"]
    given = recipe_of(classification_values | {start: str(encoder_directory)})
    stage = ClassificationStage(given)
    trained = read_encoder_config(encoder_directory).config
    assert stage.encoder.config == replace(described.encoder.config, drop_path=0.0)
    assert stage.encoder.config.window_size == trained.window_size
    assert (stage.recipe.encoder.window_size,) * 2 == trained.window_size
    line = overridden(given, stage.recipe)
    assert line is not None
    assert "data.mean" in line
    assert "encoder." not in line  # it says nothing that could be overridden
    # The recorded recipe is complete.
    assert recipe_of(yaml.safe_load(to_yaml(stage.recipe))) == stage.recipe


def test_random_weights_need_a_section_that_describes_the_encoder(
    classification_values: dict[str, Any],
) -> None:
    classification_values["encoder"] = {"drop_path": 0.1}
    with pytest.raises(RecipeError, match=r"encoder\.window_size is missing: give"):
        recipe_of(classification_values)
    del classification_values["encoder"]
    with pytest.raises(RecipeError, match=r"no encoder to train: .*--init PATH .*section encoder"):
        recipe_of(classification_values)


def test_sizes_that_are_left_to_the_variant_are_named_when_overridden(
    classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    encoder = {"variant": "tiny", "window_size": 4}
    given = recipe_of(classification_values | {"encoder": encoder, "init": str(encoder_directory)})
    line = overridden(given, resolve_architecture(given))
    assert line is not None
    assert "encoder.embed_dim 96 → 16" in line
    assert "encoder.depths [2, 2, 6, 2] → [1, 2]" in line


def test_like_is_for_random_weights(
    classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    values = classification_values | {"init": str(encoder_directory), "like": "other"}
    with pytest.raises(RecipeError, match="like is for init: scratch"):
        recipe_of(values)


def test_grey_encoders_take_grey_recipes_with_them(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    config = SwinV2Config(
        image_size=16, patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(1, 2), in_channels=1
    )
    grey = save_encoder(SwinV2(config), tmp_path / "grey", mean=[0.3], std=[0.2])
    stage = ClassificationStage(recipe_of(classification_values | {"init": str(grey)}))
    assert stage.recipe.encoder.in_channels == 1
    assert (stage.recipe.data.mean, stage.recipe.data.std) == ((0.3,), (0.2,))
    jittered = classification_values | {"augmentation": {"color_jitter": 0.4}, "init": str(grey)}
    with pytest.raises(ValueError, match=r"grey does not fit the recipe.*3 channels"):
        ClassificationStage(recipe_of(jittered))


def test_measured_statistics_are_those_of_the_encoder(
    classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    data = classification_values["data"] | {"mean": "measured", "std": "measured"}
    values = classification_values | {"data": data, "init": str(encoder_directory)}
    assert ClassificationStage.resolve(recipe_of(values)).data.mean == (0.4, 0.5, 0.6)


def test_the_run_records_what_was_trained_and_says_what_was_overridden(
    other_values: dict[str, Any],
    encoder_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other_values["training"] |= {"steps": 4, "validate_every": 4}
    config, run = tmp_path / "other.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(other_values | {"init": str(encoder_directory)}))
    command = ["finetune", "--config", str(config), "--folder", str(run)]
    assert simmim.cli.main(command) == 0
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "overrides" in one]
    for part in ("embed_dim 32 → 16", "depths [2, 2, 2] → [1, 2]", "patch_size 4 → 2", "data.mean"):
        assert part in line
    assert "window_size" not in line
    trained = read_encoder_config(run / "encoder")
    for saved in (run / "recipe.yaml", run / "checkpoints" / "step-00000004" / "recipe.yaml"):
        values = read_values(saved)
        recorded = parse(ClassificationRecipe, values, "saved")
        assert all(
            getattr(recorded.encoder.config(16), name) == getattr(trained.config, name)
            for name in (*ALL, "window_size", "image_size")
        )
        assert (recorded.data.mean, recorded.data.std) == (trained.mean, trained.std)
        assert overridden(recorded, resolve_architecture(recorded)) is None
    # It resumes by the recipe it was started with, and by the recorded one.
    assert simmim.cli.main([*command, "--resume", "auto"]) == 0
    command[2] = str(run / "recipe.yaml")
    assert simmim.cli.main([*command, "--resume", "auto"]) == 0
    # What cannot have an effect is refused by evaluate.
    capsys.readouterr()
    evaluate(run)
    assert "overrides" not in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--encoder.patch_size \(2 → 4\) has no effect"):
        evaluate(run, ["--encoder.patch_size", "4"])


def test_runs_that_recorded_what_they_were_given_still_resume(
    other_values: dict[str, Any], encoder_directory: Path, tmp_path: Path
) -> None:
    given = recipe_of(other_values | {"init": str(encoder_directory)})
    trained = ClassificationStage.resolve(given)
    run = RunFolder(path=tmp_path)
    run.recipe.write_text(to_yaml(given))
    assert run.check(trained, resume=True, given=given) == {}
    with pytest.raises(ValueError, match="patch_size: 4 → 2"):
        run.check(trained, resume=True)
    longer = replace(given, training=replace(given.training, steps=9))
    with pytest.raises(ValueError, match=r"training\.steps: 8 → 9"):
        run.check(ClassificationStage.resolve(longer), resume=True, given=longer)


def test_doctor_quotes_rates_for_the_encoder_that_is_trained(
    classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    encoder = {"variant": "base", "window_size": 4}
    values = classification_values | {"encoder": encoder, "init": str(encoder_directory)}
    found = check_learning_rate(ClassificationStage(recipe_of(values)).recipe).found
    assert "no learning rate for an encoder of this size" in found
    assert "for base" not in found


@pytest.mark.parametrize("wanted", [None, True, False])
def test_the_head_is_taken_as_asked(
    classification_values: dict[str, Any], encoder_directory: Path, wanted: bool | None
) -> None:
    values = classification_values | {"init": str(encoder_directory), "init_head": wanted}
    if wanted:
        with pytest.raises(ValueError, match="init_head is true"):
            ClassificationStage(recipe_of(values))
    trained = ClassificationStage(recipe_of(classification_values)).model.head
    trained.weight.data.fill_(7)
    save_head(trained, encoder_directory / "classifier", ("circle", "square", "stripe"))
    taken = ClassificationStage(recipe_of(values)).model.head.weight
    assert bool((taken == 7).all()) == (wanted is not False)
    save_head(trained, encoder_directory / "classifier", ("circle", "square", "other"))
    if wanted:
        with pytest.raises(ValueError, match="without all of the classes"):
            ClassificationStage(recipe_of(values))
    else:
        assert not bool((ClassificationStage(recipe_of(values)).model.head.weight == 7).any())


def test_what_has_seen_labels_is_known(encoder_directory: Path, tmp_path: Path) -> None:
    assert not saw_labels(str(encoder_directory))
    (tmp_path / "recipe.yaml").write_text("task: pretrain\n")
    assert not saw_labels(str(tmp_path / "encoder"))
    (tmp_path / "recipe.yaml").write_text("task: segmentation\n")
    assert saw_labels(str(tmp_path))
    assert saw_labels(str(tmp_path / "encoder"))
    (tmp_path / "recipe.yaml").unlink()
    (encoder_directory / "classifier").mkdir()
    assert saw_labels(str(encoder_directory))
