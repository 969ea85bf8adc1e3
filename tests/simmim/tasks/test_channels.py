"""Channels by name in training: sets, mixtures and trained weights that match, or are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import data_prep.cli
import simmim.cli
from data_prep.channels import PICTURES, RGB, AdaptRule
from simmim.data.datasets.opening import open_sets
from simmim.data.transforms.decoding import decode_image
from simmim.data.transforms.sampling import sample_images
from simmim.data.transforms.settings import DecodeSettings
from simmim.engine.checkpoint.adapting import PATCH_WEIGHT
from simmim.engine.checkpoint.resume import load_initial
from simmim.recipe import parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.probe.probe import compare
from simmim.tasks.probe.recipe import ProbeRecipe
from simmim.tasks.video.recipe import VideoRecipe
from simmim.tasks.video.stage import VideoStage
from swinv2 import SwinV2, SwinV2Config, load_encoder, read_encoder_config
from swinv2.config_file import IMPLIED_CHANNELS
from swinv2.weights import save_encoder
from tests.simmim.conftest import MEAN, STD, small_encoder

FIRES = ("blue", "green", "red", "nir", "swir2")
SWAPPED = ("red", "green", "blue", "nir", "swir2")
TWELVE = (*SWAPPED, *(f"rededge{number}" for number in (1, 2, 3)), "swir1", "coastal", "a", "b")
SETS = {1: ("green",), 4: (*RGB, "nir"), 5: FIRES, 12: TWELVE}
MakeSet = Callable[..., str]


def scene(number: int, names: tuple[str, ...]) -> np.ndarray:
    """An image in which a channel has the same values wherever it stands."""
    planes = [
        np.random.default_rng([number, *name.encode()]).integers(0, 60_000, (20, 24))
        for name in names
    ]
    return np.stack(planes, axis=-1).astype(np.uint16)


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Return a function that writes labelled arrays as shards: names, given or not → folder."""

    def make(names: tuple[str, ...], *, named: bool = True, folder: str = "") -> str:
        folder = folder or f"{'_'.join(names)}{named}"
        for number in range(16):
            path = tmp_path / folder / "images" / "ab"[number % 2] / f"{number:02}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, scene(number, names))
        place = tmp_path / folder / "shards"
        arguments = ["shard", str(tmp_path / folder / "images"), str(place)]
        arguments += ["--samples-per-shard", "4", "--workers", "1"]
        if named:
            arguments += ["--channels", ",".join(names)]
        assert data_prep.cli.main(arguments) == 0
        return str(place)

    return make


def pretraining(values: dict[str, Any], count: int = 5, **data: Any) -> PretrainStage:
    values = values | {"encoder": values["encoder"] | {"in_channels": count}}
    values["data"] = values["data"] | {"mean": [0.45] * count, "std": [0.26] * count} | data
    return PretrainStage(parse(PretrainRecipe, values, "test"))


def images_of(stage: Any) -> dict[str, Tensor]:
    """Return the validation images of a stage, by their names."""
    transform = stage._whole_images() if isinstance(stage, PretrainStage) else None
    transform = transform or stage.validation_transform()
    source, found = stage.training_shards, {}
    for shard, size in enumerate(source.sizes):
        for row in range(size):
            raw = source.read(shard, row)
            name = f"{source.folder_of(shard)} {json.loads(raw.about)['path']}"
            found[name] = transform(raw, None).image
    return found


def test_a_training_records_the_names_of_its_set(
    pretrain_values: dict[str, Any], make_set: MakeSet
) -> None:
    assert pretraining(pretrain_values, shards=make_set(FIRES)).recipe.data.channels == FIRES
    plain = pretraining(pretrain_values, shards=make_set(FIRES, named=False))
    assert plain.recipe.data.channels is None
    pictures = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    assert pictures.recipe.data.channels == RGB
    grey = pretraining(pretrain_values, 1)
    assert grey.recipe.data.channels == ("gray",)


def test_pictures_of_earlier_versions_are_colour(
    pretrain_values: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for file in shards.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "manifest.json").read_text())
    assert values.pop("channels") == list(RGB)
    (folder / "manifest.json").write_text(json.dumps(values))
    assert pretraining(pretrain_values, 3, shards=str(folder)).recipe.data.channels == RGB
    turned = pretraining(pretrain_values, 3, shards=str(folder), channels=["blue", "green", "red"])
    plain = pretraining(pretrain_values, 3, shards=str(folder))
    for name, image in images_of(plain).items():
        assert torch.equal(images_of(turned)[name], image.flip(0))


def test_a_mixture_of_swapped_bands_is_refused_and_reordered_on_request(
    pretrain_values: dict[str, Any], make_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make_set(FIRES), make_set(SWAPPED)
    mixed = [{"shards": first}, {"shards": second}]
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the whole text is compared)
        pretraining(pretrain_values, shards=mixed)
    assert str(refused.value) == (
        f"data.shards ({second}) has channels [red, green, blue, nir, swir2], and data.shards "
        f"({first}) has [blue, green, red, nir, swir2]: the same in another order; set "
        "data.channels to [blue, green, red, nir, swir2] to take them by name."
    )
    stage = pretraining(pretrain_values, shards=mixed, channels=["B2", "B3", "B4", "B8", "B12"])
    assert stage.recipe.data.channels == FIRES
    said = capsys.readouterr().err
    assert f"data.shards ({second}) has channels [red, green, blue, nir, swir2]" in said
    found = images_of(stage)
    for name, image in found.items():
        if name.startswith(second):
            assert torch.equal(image, found[name.replace(second, first)])
    batch = next(iter(stage.batches(rank=0, world=1, start=0, end=8)))
    assert batch.images.shape[1] == 5


def test_channels_are_selected_with_their_statistics(
    pretrain_values: dict[str, Any], make_set: MakeSet
) -> None:
    folder = make_set(FIRES)
    assert data_prep.cli.main(["info", folder, "--statistics", "--workers", "1"]) == 0
    measured = json.loads((Path(folder) / "statistics.json").read_text())["statistics"][0]["mean"]
    wanted = {"channels": ["nir", "red"], "mean": "measured", "std": "measured"}
    stage = pretraining(pretrain_values, 2, shards=folder, **wanted)
    assert stage.recipe.data.mean == (measured[3], measured[2])
    with pytest.raises(ValueError, match=r"names 2 channels, .* and encoder.in_channels is 5"):
        pretraining(pretrain_values, 5, shards=folder, **wanted)
    with pytest.raises(ValueError, match=r"lack thermal"):
        pretraining(pretrain_values, 2, shards=folder, **wanted | {"channels": ["nir", "thermal"]})


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (["blue", "green"], "names 2 channels, .* and encoder.in_channels is 5"),
        (["blue", "green", "red", "nir", "thermal"], "no thermal and swir2 besides; give images"),
        (["red", "red"], "red is given twice"),
    ],
)
def test_channels_that_cannot_be_taken_are_refused(
    pretrain_values: dict[str, Any], make_set: MakeSet, channels: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pretraining(pretrain_values, shards=make_set(FIRES), channels=channels)


def test_arrays_in_a_folder_are_named_by_the_recipe(
    pretrain_values: dict[str, Any], make_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(Path(make_set(SWAPPED)).parent / "images")
    stage = pretraining(pretrain_values, shards=folder, channels=FIRES)
    assert f"data.shards ({folder}) does not name its channels" in capsys.readouterr().err
    named = pretraining(
        pretrain_values, shards=folder, channels=FIRES, image_channels=list(SWAPPED)
    )
    raw = stage.training_shards.read(0, 0)
    stored, taken = (
        decode_image(raw, channels=5, settings=one.recipe.data).pixels for one in (stage, named)
    )
    assert np.array_equal(taken, stored[..., [2, 1, 0, 3, 4]])


def test_held_out_images_of_other_bands_are_refused(
    pretrain_values: dict[str, Any], make_set: MakeSet
) -> None:
    folders = {"shards": make_set(FIRES), "validation": make_set(SWAPPED)}
    with pytest.raises(ValueError, match=r"held-out set .* the same in another order"):
        pretraining(pretrain_values, **folders)


def test_picture_bands_have_names(pretrain_values: dict[str, Any], make_set: MakeSet) -> None:
    folder = make_set(FIRES)
    assert pretraining(pretrain_values, shards=folder).recipe.data.drawn_bands == (2, 1, 0)
    named = pretraining(pretrain_values, shards=folder, picture_bands=["B12", "nir", "red"])
    assert named.recipe.data.drawn_bands == (4, 3, 2)
    with pytest.raises(ValueError, match=r"thermal.* and the images have 5 channels"):
        pretraining(pretrain_values, shards=folder, picture_bands=["thermal"])
    unnamed = make_set(FIRES, named=False)
    stage = pretraining(pretrain_values, shards=unnamed, picture_bands=["nir"])
    with pytest.raises(ValueError, match=r"have no names"):
        _ = stage.recipe.data.drawn_bands


def saved(tmp_path: Path, channels: tuple[str, ...] | None, name: str = "trained") -> str:
    """Save a trained encoder of three channels."""
    path = tmp_path / name
    return str(save_encoder(small_encoder(), path, mean=MEAN, std=STD, channels=channels))


def finetuning(values: dict[str, Any], init: str, **changes: Any) -> ClassificationStage:
    rule = changes.pop("rule", None)
    encoder = values["encoder"] | ({} if rule is None else {"adapt_channels": rule})
    changes.setdefault("slots", None)
    values = values | {"encoder": encoder, "init": init, "data": values["data"] | changes}
    return ClassificationStage(parse(ClassificationRecipe, values, "test"))


@pytest.mark.parametrize("channels", [1, 4, 5, 12])
@pytest.mark.parametrize("rule", ["repeat", "average", "zero"])
def test_an_encoder_is_adapted_by_name(
    classification_values: dict[str, Any],
    make_set: MakeSet,
    tmp_path: Path,
    channels: int,
    rule: AdaptRule,
) -> None:
    names, init = SETS[channels], saved(tmp_path, RGB)
    trained = load_encoder(init).state_dict()
    given = {"mean": [0.3] * channels, "std": [0.1] * channels}
    stage = finetuning(
        classification_values,
        init,
        shards=make_set(names),
        channels=list(names),
        rule=rule,
        **given,
    )
    old = trained[PATCH_WEIGHT]
    new = stage.encoder.state_dict()[PATCH_WEIGHT]
    assert new.shape[1] == channels == stage.recipe.encoder.in_channels
    unknown = iter(range(channels))
    for place, name in enumerate(names):
        if name in RGB:
            expected, mean = old[:, RGB.index(name)], MEAN[RGB.index(name)]
        else:
            number = next(unknown)
            starts = {"repeat": old[:, number % 3], "average": old.mean(1), "zero": 0 * old[:, 0]}
            expected, mean = starts[rule], 0.3
        torch.testing.assert_close(new[:, place], expected, rtol=0, atol=1e-7)
        if name in RGB:
            assert torch.equal(new[:, place], expected)
        assert stage.initial.mean[place] == mean
    others = {name: one for name, one in stage.encoder.state_dict().items() if name != PATCH_WEIGHT}
    assert all(torch.equal(one, trained[name]) for name, one in others.items())
    assert stage.initial.channels == stage.recipe.data.channels == names


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4, 5, 12])
def test_an_adapted_encoder_starts_with_the_same_features(
    classification_values: dict[str, Any], make_set: MakeSet, tmp_path: Path, channels: int
) -> None:
    """Of the same pixels: other bands have zero weight, and those that are missing are 0."""
    init, many = saved(tmp_path, RGB), SETS[channels]
    few = finetuning(classification_values, init, shards=make_set(RGB))
    given = {"mean": [0.3] * channels, "std": [0.1] * channels}
    adapted = finetuning(
        classification_values,
        init,
        shards=make_set(many),
        channels=list(many),
        rule="zero",
        **given,
    )
    folders = [stage.training_shards.folder for stage in (few, adapted)]
    found = images_of(adapted)
    features = []
    for name, image in images_of(few).items():
        other = found[name.replace(str(folders[0]), str(folders[1]))]
        ours = few.module.normalise(image[None])
        ours[:, [name not in many for name in RGB]] = 0
        theirs = adapted.module.normalise(other[None])
        features.append([few.encoder.eval()(ours), adapted.encoder.eval()(theirs)])
    assert len(features) == 8
    for ours, theirs in features:
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert float(torch.stack([one[0] for one in features]).std()) > 0.01


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no red, green, blue and nir besides; give images .* encoder.adapt_channels"),
        (
            {"channels": ["nir"]},
            r"shared: none; new: nir; left out: red, green, blue\). Say what new channels start",
        ),
        ({"channels": ["nir"], "rule": "average"}, "nir is new to the trained weights"),
        (
            {"channels": ["nir"], "rule": "zero"},
            "none is shared, so .* Set it to repeat or average",
        ),
    ],
)
def test_weights_are_never_adapted_silently(
    classification_values: dict[str, Any],
    make_set: MakeSet,
    tmp_path: Path,
    data: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        finetuning(classification_values, saved(tmp_path, RGB), shards=make_set(("nir",)), **data)


@torch.no_grad()
def test_images_in_another_order_than_the_weights_are_refused(
    classification_values: dict[str, Any], make_set: MakeSet, tmp_path: Path
) -> None:
    init, folder = saved(tmp_path, RGB), make_set(("blue", "green", "red"))
    with pytest.raises(ValueError, match=r"another order; set data.channels to .red, green, blue."):
        finetuning(classification_values, init, shards=folder)
    taken = finetuning(classification_values, init, shards=folder, channels=list(RGB))
    turned = finetuning(
        classification_values, init, shards=folder, channels=["blue", "green", "red"]
    )
    first, second = (
        stage.encoder.eval()(stage.module.normalise(torch.stack(list(images_of(stage).values()))))
        for stage in (taken, turned)
    )
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    more = make_set(FIRES)
    with pytest.raises(ValueError, match=r"nir, swir2 besides; set data.channels to") as refused:
        finetuning(classification_values, init, shards=more)
    assert "data.channels to [blue, green, red, nir, swir2] and encoder.adapt_channels" in str(
        refused.value
    )
    assert (
        finetuning(classification_values, init, shards=more, channels=list(RGB)).initial.channels
        == RGB
    )


def test_weights_without_names_are_matched_by_number(
    classification_values: dict[str, Any],
    make_set: MakeSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init = saved(tmp_path, None, "unnamed")
    stage = finetuning(classification_values, init, shards=make_set(("a", "b", "c")))
    assert stage.initial.channels == ("a", "b", "c")
    assert "does not name its channels: they are taken as [a, b, c]" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"weights for 3 channels without names"):
        finetuning(
            classification_values,
            init,
            shards=make_set(FIRES),
            channels=list(FIRES),
            rule="zero",
        )


def test_an_adapted_run_goes_on_and_is_exported(
    classification_values: dict[str, Any], make_set: MakeSet, tmp_path: Path
) -> None:
    values = classification_values | {"init": saved(tmp_path, RGB)}
    values["encoder"] |= {"adapt_channels": "average"}
    values["training"] |= {"steps": 4, "checkpoint_every": 2}
    values["data"] |= {"shards": make_set(FIRES), "slots": None, "validation_shards": 1}
    values["data"] |= {"channels": list(FIRES), "mean": [0.3] * 5, "std": [0.1] * 5}
    config, run = tmp_path / "adapted.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(values))
    command = ["finetune", "--config", str(config), "--folder", str(run)]
    assert simmim.cli.main(command) == 0
    described = read_encoder_config(run / "encoder")
    assert described.channels == FIRES
    assert described.mean == (MEAN[2], MEAN[1], MEAN[0], 0.3, 0.3)
    recorded = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recorded["data"]["channels"] == list(FIRES)
    assert recorded["encoder"]["in_channels"] == 5
    assert simmim.cli.main([*command, "--resume", "auto", "--training.steps", "6"]) == 2
    again = ["finetune", "--config", str(run / "recipe.yaml"), "--folder", str(run)]
    assert simmim.cli.main([*again, "--resume", "auto"]) == 0
    assert simmim.cli.main(["evaluate", str(run)]) == 0
    swapped = ["evaluate", str(run), "--data", make_set(SWAPPED)]
    assert simmim.cli.main(swapped) == 2
    assert simmim.cli.main([*swapped, "--data.channels", json.dumps(list(FIRES))]) == 0
    for form in ("native", "torch-export"):
        folder = tmp_path / form
        assert simmim.cli.main(["export", str(run), str(folder), "--format", form]) == 0
        assert "blue, green, red, nir, swir2" in (folder / "README.md").read_text()
    assert read_encoder_config(tmp_path / "native").channels == FIRES


@pytest.mark.parametrize("source", ["run", "encoder"])
@pytest.mark.parametrize("rule", ["repeat", "average", "zero"])
def test_a_pretraining_starts_from_weights_of_other_channels(
    pretrain_values: dict[str, Any],
    pretrain_config: Path,
    make_set: MakeSet,
    tmp_path: Path,
    source: str,
    rule: str,
) -> None:
    run, folder = tmp_path / "rgb", make_set(FIRES)
    values = pretrain_values | {"training": pretrain_values["training"] | {"steps": 2}}
    values["training"]["ema_decay"] = 0.9
    pretrain_config.write_text(yaml.safe_dump(values))
    assert (
        simmim.cli.main(["pretrain", "--config", str(pretrain_config), "--folder", str(run)]) == 0
    )
    trained = load_encoder(run / "encoder").state_dict()[PATCH_WEIGHT]
    path = run if source == "run" else run / "encoder"
    stage = pretraining(pretrain_values, shards=folder)
    with pytest.raises(ValueError, match=r"new: nir, swir2"):
        load_initial(path, stage.module, stage.recipe)
    adapting = pretrain_values | {"encoder": pretrain_values["encoder"] | {"adapt_channels": rule}}
    stage = pretraining(adapting, shards=folder)
    said = load_initial(path, stage.module, stage.recipe)
    assert "blue, green, red keep their weights; nir, swir2 start from" in said
    found = stage.encoder.state_dict()[PATCH_WEIGHT]
    assert torch.equal(found[:, :3], trained.flip(1))
    starts = {
        "repeat": trained[:, :2],
        "average": trained.mean(1, keepdim=True).expand(-1, 2, -1, -1),
        "zero": torch.zeros_like(trained[:, :2]),
    }
    torch.testing.assert_close(found[:, 3:], starts[rule], rtol=0, atol=1e-7)


def test_mean_and_std_to_keep_are_matched_by_name(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    """Those of --init-from, in the order of the images; new channels keep the recipe's."""
    start = read_encoder_config(Path(saved(tmp_path, RGB)))
    values = pretrain_values | {"encoder": pretrain_values["encoder"] | {"in_channels": 5}}
    values["data"] |= {"mean": [0.1] * 5, "std": [0.2] * 5, "channels": list(FIRES)}
    red, green, blue = start.mean
    mean, std = parse(PretrainRecipe, values, "test").differences_from(start, None)
    assert mean.startswith("data.mean is [0.1, 0.1, 0.1, 0.1, 0.1]; ")
    assert mean.endswith(f"set it to {[blue, green, red, 0.1, 0.1]}")
    assert std.endswith("0.2, 0.2]")
    values["data"] |= {
        "mean": [blue, green, red, 0.1, 0.1],
        "std": [*start.std[::-1], 0.2, 0.2],
    }
    assert parse(PretrainRecipe, values, "test").differences_from(start, None) == []


def test_an_encoder_is_evaluated_on_its_channels_by_name(
    pretrain_values: dict[str, Any],
    make_set: MakeSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss is the same on a set in another order, though the recipe names no channels."""
    values = pretrain_values | {"encoder": pretrain_values["encoder"] | {"in_channels": 5}}
    values["training"] |= {"steps": 2, "checkpoint_every": 2}
    first, second = make_set(FIRES), make_set(SWAPPED)
    values["data"] |= {"shards": first, "slots": None, "mean": [0.4] * 5, "std": [0.2] * 5}
    config, run = tmp_path / "five.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(values))
    assert simmim.cli.main(["pretrain", "--config", str(config), "--folder", str(run)]) == 0
    found = []
    for folder in (first, second):
        command = ["evaluate", str(run / "encoder"), "--config", str(config)]
        capsys.readouterr()
        assert simmim.cli.main([*command, "--data.validation", folder]) == 0
        said = capsys.readouterr()
        found.append([line for line in said.out.splitlines() if "validation_loss" in line])
    assert found[0] == found[1] != []
    assert "are taken by name" in said.err


def test_a_probe_refuses_images_of_another_order(make_set: MakeSet, tmp_path: Path) -> None:
    init, folder = saved(tmp_path, RGB), make_set(("blue", "green", "red"))
    data: dict[str, Any] = {"shards": folder, "workers": 0}
    values: dict[str, Any] = {"encoder": init, "init": "pretrained", "data": data}
    with pytest.raises(ValueError, match=r"the same in another order; set data.channels"):
        compare(parse(ProbeRecipe, values, "test"))
    taken = compare(parse(ProbeRecipe, values | {"data": data | {"channels": list(RGB)}}, "test"))
    own = {"shards": make_set(RGB), "workers": 0}
    assert taken == compare(parse(ProbeRecipe, values | {"data": own}, "test"))
    other = {"shards": make_set(("green", "blue", "nir")), "workers": 0}
    with pytest.raises(ValueError, match=r"no red and nir besides; give images that have them\.$"):
        compare(parse(ProbeRecipe, values | {"data": other}, "test"))
    with pytest.raises(ValueError, match=r"set data.channels to these"):
        compare(parse(ProbeRecipe, values | {"data": data | {"channels": ["blue"]}}, "test"))


def test_libraries_that_hand_over_colour_get_no_other_order(tmp_path: Path) -> None:
    init = saved(tmp_path, ("blue", "green", "red"))
    command = ["export", init, str(tmp_path / "out"), "--format"]
    assert simmim.cli.main([*command, "reference"]) == 2
    assert simmim.cli.main([*command, "native"]) == 0


def test_names_of_pictures_agree_with_the_encoder_directory() -> None:
    assert {count: PICTURES[count] for count in IMPLIED_CHANNELS} == dict(IMPLIED_CHANNELS)
    assert PATCH_WEIGHT in SwinV2(small_encoder().config).state_dict()


def test_values_without_a_measurement_are_left_out_of_sampled_statistics(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        values = scene(number, FIRES) // 2 + 20_000
        values[: 5 * number, :, 3] = 0
        values[:, :, 4] *= number > 0  # one image without any
        np.save(folder / f"{number}.npy", values)
    for name, options in (("left_out", ["--no-data", "0"]), ("counted", [])):
        command = ["shard", str(folder), str(tmp_path / name), "--workers", "1", *options]
        assert data_prep.cli.main(command) == 0
    found = {
        name: sample_images(
            open_sets(str(tmp_path / name)), channels=5, data=DecodeSettings(), most=9, seconds=60
        )
        for name in ("left_out", "counted")
    }
    mean, std = found["left_out"].statistics(found["left_out"].main)
    np.testing.assert_allclose(mean, 35_000 / 65_535, atol=0.02)
    np.testing.assert_allclose(std, 30_000 / 12**0.5 / 65_535, atol=0.02)
    counted, _ = found["counted"].statistics(found["counted"].main)
    assert counted[3] < 0.4 < mean[3]
    assert counted[4] < 0.45 < mean[4]


@pytest.mark.parametrize("form", ["reference", "timm"])
def test_names_come_back_from_exports(tmp_path: Path, form: str) -> None:
    config = SwinV2Config(
        image_size=64, in_channels=5, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    )
    encoder = SwinV2(replace(config, window_size=(8, 8)))
    numbers = {"mean": [0.5] * 5, "std": [0.2] * 5}
    save_encoder(encoder, tmp_path / "five", **numbers, channels=FIRES)
    out, back = tmp_path / form, tmp_path / "back"
    command = ["export", str(tmp_path / "five"), str(out), "--format", form]
    assert simmim.cli.main(command) == 0
    assert "blue, green, red, nir, swir2" in (out / "README.md").read_text()
    source = out / "checkpoint.pth" if form == "reference" else out
    assert simmim.cli.main(["import", str(source), str(back), "--format", form]) == 0
    assert read_encoder_config(back).channels == FIRES
    given = ["import", str(source), str(back), "--format", form, "--channels", "a,b,c,d,e"]
    assert simmim.cli.main(given) == 0
    assert read_encoder_config(back).channels == ("a", "b", "c", "d", "e")


def test_clips_take_weights_of_their_channels_by_name(tmp_path: Path) -> None:
    pytest.importorskip("av")
    swapped = saved(tmp_path, ("blue", "green", "red"), "swapped")
    video = {"clips": str(tmp_path), "image_size": 16, "frames": 4}
    values: dict[str, Any] = {"task": "video", "init": swapped, "data": video}
    values |= {"encoder": {"window_size": 4}, "training": {"batch_size": 2, "steps": 2}}
    values["training"]["optimizer"] = {"lr": 1e-3}
    with pytest.raises(ValueError, match=r"clips have channels \[red, green, blue\], and data"):
        VideoStage.resolve(parse(VideoRecipe, values, "test"))
    values["data"] = video | {"channels": list(RGB)}
    recipe = VideoStage.resolve(parse(VideoRecipe, values, "test"))
    assert recipe.data.mean == MEAN[::-1]
    initial = VideoStage.load_initial(recipe)
    plain = load_encoder(swapped).state_dict()[PATCH_WEIGHT]
    found = initial.encoder.state_dict()[PATCH_WEIGHT]
    shape = (*found.shape[:1], 3, -1, *found.shape[2:])
    assert torch.allclose(found.reshape(shape).sum(2), plain.flip(1), atol=1e-5)


def test_a_run_of_before_resumes_though_its_recipe_names_no_channels(
    pretrain_values: dict[str, Any], pretrain_config: Path, shards: Path, tmp_path: Path
) -> None:
    code = data_prep.cli.main(["info", str(shards), "--statistics", "--workers", "1"])
    assert code == 0
    pretrain_values["data"] |= {"mean": "measured", "std": "measured"}
    pretrain_values["training"] |= {"steps": 4, "checkpoint_every": 4}
    pretrain_config.write_text(yaml.safe_dump(pretrain_values))
    run = tmp_path / "run"
    command = ["pretrain", "--config", str(pretrain_config), "--folder", str(run)]
    assert simmim.cli.main(command) == 0
    shutil.rmtree(run / "checkpoints")  # stopped before the first
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    assert values["data"].pop("channels") == list(RGB)
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    resumed = [*command, "--resume", "auto"]
    turned = [*resumed, "--data.channels", "[blue, green, red]"]
    assert simmim.cli.main(turned) == 2
    assert simmim.cli.main(resumed) == 0


def test_a_stream_beside_a_set_is_named_too(
    pretrain_values: dict[str, Any], make_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = {"tars": f"{make_set(SWAPPED)}/*.tar", "samples": 8}
    folder = make_set(FIRES)
    pretrain_values["training"]["batch_size"] = 4
    plain = pretraining(pretrain_values, shards=folder, stream=stream)
    assert plain.recipe.data.channels == FIRES
    said = capsys.readouterr().err
    assert f"({stream['tars']}) does not name its channels: they are taken as [blue, green" in said
    named = {"channels": list(FIRES), "image_channels": list(SWAPPED)}
    pretraining(pretrain_values, shards=folder, stream=stream, **named)
    assert f"({stream['tars']}) has channels [red, green, blue, nir" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"the same in another order; set data.channels to"):
        pretraining(pretrain_values, shards=folder, stream=stream, image_channels=list(SWAPPED))


def test_mean_and_std_of_imagenet_follow_the_order_of_the_colours(
    pretrain_values: dict[str, Any], make_set: MakeSet
) -> None:
    pretrain_values["data"] |= {"shards": make_set(("blue", "green", "red"))}
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    assert stage.recipe.data.mean == (0.406, 0.456, 0.485)
    assert stage.recipe.data.std == (0.225, 0.224, 0.229)
    assert stage.fresh().recipe == stage.recipe
    pretrain_values["data"] |= {"channels": ["red", "green", "blue"]}
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    assert stage.recipe.data.mean == (0.485, 0.456, 0.406)


def test_exports_know_the_range_of_images_of_more_bands(
    classification_values: dict[str, Any], make_set: MakeSet, tmp_path: Path
) -> None:
    """Of 16 bits, though the set has five bands and the encoder takes three of them."""
    values = classification_values | {"init": saved(tmp_path, RGB)}
    values["training"] |= {"steps": 2, "checkpoint_every": 2}
    values["data"] |= {"shards": make_set(FIRES), "slots": None, "validation_shards": 1}
    values["data"]["channels"] = list(RGB)
    config, run, out = tmp_path / "three.yaml", tmp_path / "run", tmp_path / "out"
    config.write_text(yaml.safe_dump(values))
    assert simmim.cli.main(["finetune", "--config", str(config), "--folder", str(run)]) == 0
    assert simmim.cli.main(["export", str(run), str(out), "--format", "torch-export"]) == 0
    described = json.loads((out / "preprocessing.json").read_text())["preparation"]
    assert described["channel_names"] == list(RGB)
    assert described["rescale_factor"] == pytest.approx(1 / 65_535)


@pytest.mark.parametrize("dtype", ["uint16", "uint8"])
def test_exports_look_at_arrays_whose_channels_the_recipe_names(
    pretrain_values: dict[str, Any], tmp_path: Path, dtype: str
) -> None:
    """Three of five bands, of a folder; arrays are no pictures for an image processor."""
    for number in range(16):
        path = tmp_path / "images" / f"{number:02}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, scene(number, FIRES).astype(dtype))
    values = pretrain_values
    values["training"] |= {"steps": 2, "checkpoint_every": 2}
    values["data"] |= {"shards": str(tmp_path / "images"), "slots": None}
    values["data"] |= {"image_channels": list(FIRES), "channels": list(RGB)}
    config, run, out = tmp_path / "three.yaml", tmp_path / "run", tmp_path / "out"
    config.write_text(yaml.safe_dump(values))
    assert simmim.cli.main(["pretrain", "--config", str(config), "--folder", str(run)]) == 0
    for _ in range(2):
        assert simmim.cli.main(["export", str(run), str(out), "--format", "torch-export"]) == 0
        described = json.loads((out / "preprocessing.json").read_text())["preparation"]
        assert described["rescale_factor"] == pytest.approx(1 / np.iinfo(dtype).max)
        shutil.rmtree(out)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the encoder directory is left
    pytest.importorskip("transformers")
    assert simmim.cli.main(["export", str(run), str(out), "--format", "transformers"]) == 0
