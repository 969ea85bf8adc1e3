import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from simmim.data.datasets.mixture import MixedShards
from simmim.data.datasets.opening import WeightedShards, measured_statistics
from simmim.data.datasets.shards import ShardSet
from simmim.data.settings import DataSettings, with_statistics
from simmim.recipe import RecipeError, parse, to_values
from tests.simmim.data.conftest import WriteShards
from tests.simmim.data.measured import write_measured


def test_a_folder_or_a_list_of_folders(write_shards: WriteShards) -> None:
    folders = [str(write_shards([4, 4], ("a", "b"), name=name)) for name in ("one", "two")]
    one = parse(DataSettings, {"shards": folders[0]}, "test")
    assert isinstance(one.open_shards(), ShardSet)
    listed = [{"shards": folders[0], "weight": 3}, {"shards": folders[1]}]
    both = parse(DataSettings, {"shards": listed}, "test")
    opened = both.open_shards()
    assert isinstance(opened, MixedShards)
    assert opened.weights == (3.0, 1.0)
    assert parse(DataSettings, to_values(both), "test") == both
    training, validation = both.split_shards()
    assert (training.sizes, validation.sizes) == ([4, 4], [4, 4])


def test_a_part_of_the_images(write_shards: WriteShards) -> None:
    folder = str(write_shards([12, 12, 6], ("a", "b", "c")))
    data = DataSettings(shards=folder, classes=("a", "c"), fraction=0.5)
    training, validation = data.split_shards()
    assert training.classes == validation.classes == ("a", "c")
    assert (training.samples, validation.samples) == (8, 4)
    other = DataSettings(shards=folder, classes=("a", "c"), fraction=0.5, fraction_seed=1)
    assert other.split_shards()[0].digest != training.digest
    with pytest.raises(ValueError, match="no class d"):
        DataSettings(shards=folder, classes=("d",)).open_shards()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shards": ""}, "shards .*give a folder"),
        ({"shards": []}, "shards .*give a folder"),
        ({"shards": [{"shards": "a", "weight": 0}]}, "weight is 0;"),
        ({"shards": [{"shards": "a", "wieght": 1}]}, "did you mean weight"),
        ({"shards": "a", "fraction": 0}, "fraction is 0;"),
        ({"shards": "a", "max_bad_share": 2}, "max_bad_share is 2;"),
        ({"shards": "a", "mean": "guessed"}, "measured"),
        ({"shards": "a", "mean": [0.5]}, "one number per channel"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(DataSettings, values, "test")


@pytest.fixture
def measured_set(write_shards: WriteShards) -> Callable[..., str]:
    """Shards with these statistics."""

    def make(name: str, mean: list[float], std: list[float]) -> str:
        folder = write_shards([4, 4], name=name)
        write_measured(folder, mean, std)
        return str(folder)

    return make


def test_measured_statistics(measured_set: Callable[..., str]) -> None:
    folder = measured_set("one", [0.25, 0.5], [0.1, 0.2])
    data = with_statistics(DataSettings(shards=folder, mean="measured", std="measured"))
    assert data.normalisation == ((0.25, 0.5), (0.1, 0.2))
    half = with_statistics(DataSettings(shards=folder, mean=(0.0, 0.0), std="measured"))
    assert half.normalisation == ((0.0, 0.0), (0.1, 0.2))
    plain = DataSettings(shards="nowhere")
    assert with_statistics(plain) is plain


def test_statistics_of_a_mixture_are_those_of_all_its_pixels(
    measured_set: Callable[..., str],
) -> None:
    folders = [
        measured_set("one", [0.0], [1.0]),
        measured_set("two", [4.0], [2.0]),
    ]
    found = measured_statistics(folders, [3, 1])
    assert found.mean == (1.0,)
    assert found.std[0] ** 2 == pytest.approx(0.75 * 1 + 0.25 * (4 + 16) - 1)
    mixed = DataSettings(
        shards=tuple(WeightedShards(shards=folder) for folder in folders),
        mean="measured",
        std="measured",
    )
    assert with_statistics(mixed).normalisation[0] == (2.0,)
    other = measured_set("three", [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match="different numbers of channels"):
        measured_statistics([folders[0], other], [1, 1])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"statistics": [], "shards": ""}'])
def test_missing_or_invalid_statistics_are_refused(write_shards: WriteShards, content: str) -> None:
    folder = write_shards([4, 4])
    with pytest.raises(ValueError, match="data-prep info"):
        measured_statistics([str(folder)])
    (folder / "statistics.json").write_text(content)
    with pytest.raises(ValueError, match="data-prep info"):
        measured_statistics([str(folder)])


def test_a_constant_channel_is_refused(measured_set: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"set data\.mean and data\.std"):
        measured_statistics([measured_set("flat", [0.5], [0.0])])


def test_settings_import_no_torch() -> None:
    modules = (
        "simmim.method.settings",
        "simmim.data.settings",
        "simmim.data.transforms.settings",
        "simmim.data.datasets.label_maps",
    )
    heavy = "{'torch', 'accelerate', 'transformers'} & sys.modules.keys()"
    program = f"import sys, {', '.join(modules)}; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
