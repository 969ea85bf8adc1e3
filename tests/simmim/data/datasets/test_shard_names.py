"""Some of the shards of a folder: patterns in data.shards, data.include and data.exclude."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from simmim.data.datasets.opening import WeightedShards, measured_statistics, open_sets
from simmim.data.datasets.shards import ShardSet
from simmim.data.settings import DataSettings, with_statistics
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.train import train_recipe


@pytest.fixture
def tars(shards: Path, tmp_path: Path) -> Path:
    """Six tars of training and two of validation in one folder, not indexed."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, entry in enumerate(read_manifest(shards).shards):
        name = f"train-{number:02d}.tar" if number < 6 else f"val-{number - 6}.tar"
        shutil.copyfile(shards / entry.name, folder / name)
    return folder


@pytest.fixture
def both(tars: Path) -> Path:
    """That folder, indexed as one set."""
    assert main(["index", str(tars), "--include", "*", "--workers", "1"]) == 0
    return tars


def _names(opened: Any) -> list[str]:
    assert isinstance(opened, ShardSet)
    return [shard.name for shard in opened.manifest.shards]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train-{00..02}.tar", ["train-00.tar", "train-01.tar", "train-02.tar"]),
        ("val-*.tar", ["val-0.tar", "val-1.tar"]),
        ("{val-1,train-05}.tar", ["train-05.tar", "val-1.tar"]),
        ("train-03.tar", ["train-03.tar"]),
    ],
)
def test_a_pattern_chooses_among_the_shards_of_the_manifest(
    both: Path, pattern: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    opened = open_sets(f"{both}/{pattern}")
    assert _names(opened) == names
    assert opened.sizes == [12] * len(names)
    every = open_sets(str(both))
    numbers = [_names(every).index(name) for name in names]
    assert opened.read(0, 3) == every.read(numbers[0], 3)
    if len(names) > 1:
        assert open_sets(f"{both}/{pattern}").digest != every.digest
    said = capsys.readouterr().err
    assert said.count("train (6), val (2)") == 1  # by the whole set alone
    assert "data.include" in said


def test_include_and_exclude_are_the_same_choice(both: Path) -> None:
    pattern = DataSettings(shards=f"{both}/train-{{01..05}}.tar").open_shards()
    included = DataSettings(shards=str(both), include="train-*", exclude=("*-00.tar",))
    assert included.open_shards().digest == pattern.digest
    assert _names(included.open_shards()) == [f"train-{number:02d}.tar" for number in range(1, 6)]
    mixed = (WeightedShards(shards=f"{both}/train-*.tar"), WeightedShards(shards=str(both)))
    sizes = DataSettings(shards=mixed, exclude=("train-00.tar",)).open_shards().sizes
    assert sizes == [12] * 12
    training, validation = included.split_shards()
    assert (training.samples, validation.samples) == (48, 12)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shards": "{}/trian-*.tar"}, "trian"),
        ({"shards": "{}/train-{{00..09}}.tar"}, r"lacks train-06\.tar.*--include"),
        ({"shards": "{}/train-{{00..09.tar"}, "braces"),
        ({"shards": "{}/../{{a,b}}/0.tar"}, "several folders"),
        ({"shards": "{}", "include": ("trian-*",)}, "trian"),
        ({"shards": "{}", "exclude": ("*",)}, "excluded"),
        ({"shards": "{}/nowhere/train-*.tar"}, "nowhere does not exist"),
    ],
)
def test_a_wrong_choice_is_named(both: Path, data: dict[str, Any], message: str) -> None:
    settings = DataSettings(**data | {"shards": data["shards"].format(both)})
    with pytest.raises(ValueError, match=message):
        settings.open_shards()


def test_the_advice_for_tars_without_a_manifest_works(
    tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = f"{tars}/train-{{00..05}}.tar"
    with pytest.raises(ValueError, match="data-prep index") as error:
        open_sets(pattern)
    advice = str(error.value).partition("data-prep ")[2]
    assert advice == f"index '{pattern}'"
    assert main(["index", pattern, "--workers", "1"]) == 0
    assert open_sets(pattern).samples == 72
    # The other split in the same folder is not in the manifest, and cannot be used unseen.
    with pytest.raises(ValueError, match=r"lacks val-0\.tar, val-1\.tar|--include '\*'"):
        open_sets(f"{tars}/val-{{0..1}}.tar")


def test_images_in_folders_are_not_chosen_by_the_names_of_shards(shards: Path) -> None:
    settings = DataSettings(shards=str(shards.parent / "images"), include=("*.png",))
    with pytest.raises(ValueError, match=r"data\.include.*folder of images"):
        settings.open_shards()


def test_statistics_are_those_of_the_folder(both: Path) -> None:
    assert main(["info", str(both), "--statistics", "--workers", "1"]) == 0
    pattern = f"{both}/train-*.tar"
    assert measured_statistics([pattern]) == measured_statistics([str(both)])
    data = with_statistics(DataSettings(shards=pattern, mean="measured", std="measured"))
    assert data.mean == measured_statistics([str(both)]).mean


def test_one_folder_trains_and_validates(both: Path, classification_values: dict[str, Any]) -> None:
    classification_values["data"] |= {
        "shards": f"{both}/train-*.tar",
        "validation": f"{both}/val-{{0..1}}.tar",
    }
    stage = ClassificationStage(parse(ClassificationRecipe, classification_values, "test"))
    assert stage.training_shards.samples == 72
    assert stage.validation_shards is not None
    assert stage.validation_shards.samples == 24


def _pretrain(values: dict[str, Any], path: Path, resume: str | None = None) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    run = RunFolder(path=path)
    recipe = parse(PretrainRecipe, values, "test")
    train_recipe(PretrainStage, recipe, run=run, resume=resume, allow_changes=False)
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


def test_a_run_resumes_with_the_same_shards_however_they_are_named(
    both: Path, pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    pretrain_values["data"] |= {"shards": str(both), "include": ["train-*"]}
    few = {"steps": 4, "log_every": 1, "checkpoint_every": 2, "validate_every": 4, "look_every": 4}
    pretrain_values["training"] |= few
    whole = _pretrain(pretrain_values, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    del pretrain_values["data"]["include"]
    with pytest.raises(ValueError, match="data"):  # other images
        _pretrain(pretrain_values, tmp_path / "run", resume="auto")
    pretrain_values["data"]["shards"] = f"{both}/train-{{00..05}}.tar"
    assert _pretrain(pretrain_values, tmp_path / "run", resume="auto") == whole
