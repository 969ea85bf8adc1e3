"""Channels by name in training: sets and mixtures that match, or are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import data_prep.cli
import simmim.cli
from data_prep.channels import RGB
from simmim.data.datasets.opening import open_sets
from simmim.data.transforms.decoding import decode_image
from simmim.data.transforms.sampling import sample_images
from simmim.data.transforms.settings import DecodeSettings
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.probe.probe import compare
from simmim.tasks.probe.recipe import ProbeRecipe
from tests.simmim.tasks.channel_sets import (
    FIRES,
    SWAPPED,
    MakeSet,
    images_of,
    pretraining,
    saved,
    scene,
)


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
        (
            ["blue", "green", "red", "nir", "thermal"],
            "missing thermal, additional swir2; give images",
        ),
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
    with pytest.raises(
        ValueError, match=r"missing red, additional nir; give images that have them\.$"
    ):
        compare(parse(ProbeRecipe, values | {"data": other}, "test"))
    with pytest.raises(ValueError, match=r"set data.channels to these"):
        compare(parse(ProbeRecipe, values | {"data": data | {"channels": ["blue"]}}, "test"))


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
