"""Images of several kinds in one set: types, channels and transparency are named."""

import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_prep.cli
from simmim.data.datasets.opening import open_sets
from simmim.data.transforms.decoding import decode_pixels
from simmim.recipe import parse
from simmim.tasks.input_check import (
    EncoderInput,
    check_input,
    check_stage_input,
)
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from tests.simmim.tasks.example_images import (
    IMAGES,
    LIMIT,
    PHOTOS,
    findings,
    make_set,
    settings_in,
    truth,
    values_of,
    write_images,
)


@pytest.mark.parametrize("tarred", [False, True])
def test_channels_before_rows_are_recognised_as_in_shard(tmp_path: Path, tarred: bool) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    shape, last = (5, 24, 32), (24, 32, 5)
    arrays = [
        np.random.default_rng(n).integers(0, 3000, shape).astype("uint16") for n in range(IMAGES)
    ]
    for number, values in enumerate(arrays):
        np.save(folder / f"{number}.npy", values)
    if tarred:
        place = tmp_path / "tars"
        place.mkdir()
        with tarfile.open(place / "a.tar", "w") as tar:
            for number in range(IMAGES):
                tar.add(folder / f"{number}.npy", f"{number}.npy")
        assert data_prep.cli.main(["index", str(place)]) == 0
        folder = place
    with pytest.raises(ValueError, match="5 channels and 16 bits") as caught:
        check_input(open_sets(str(folder)), PHOTOS, LIMIT)
    channels, mean, _ = settings_in(str(caught.value))
    assert channels == 5
    fits = EncoderInput(channels=5, mean=mean, std=settings_in(str(caught.value))[2])
    assert check_input(open_sets(str(folder)), fits, LIMIT) == []
    shards = open_sets(str(folder))
    raw = shards.read(0, 0)
    pixels = decode_pixels(raw.image, raw.extension, channels=5).pixels
    assert pixels.shape == last
    assert any((pixels == np.moveaxis(values, 0, -1)).all() for values in arrays)
    kept = decode_pixels(raw.image, raw.extension, channels=shape[-1]).pixels
    assert kept.shape == shape  # what has the channels of the encoder is left


def test_long_lists_of_values_are_not_printed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", "uint8x40-255")
    with pytest.raises(ValueError, match=r"encoder\.in_channels to 40.*measured") as caught:
        check_input(open_sets(str(folder)), PHOTOS, LIMIT)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kinds", "as_shards"),
    [(("uint8x5-255", "float32x5-1"), False), (("uint8x3-255", "float32x3-1"), True)],
)
def test_types_that_no_batch_can_mix_are_refused_at_once_with_an_example_of_each(
    tmp_path: Path, kinds: tuple[str, str], as_shards: bool
) -> None:
    for number, kind in enumerate(kinds):
        write_images(tmp_path / "images" / f"part{number}", kind)
    folder = tmp_path / "images"
    if as_shards:
        assert data_prep.cli.main(["shard", str(folder), str(tmp_path / "shards")]) == 0
        folder = tmp_path / "shards"
    channels = int(kinds[0].split("-")[0][-1])
    wanted = EncoderInput(channels=channels, mean=(0.5,) * channels, std=(0.28,) * channels)
    with pytest.raises(ValueError, match=r"cannot mix: float32 .*uint8") as caught:
        check_input(open_sets(str(folder)), wanted, LIMIT)
    message = str(caught.value)
    for word in ("--include", "--exclude", *(() if as_shards else ("part0/", "part1/"))):
        assert word in message
    assert len(re.findall(r"such as [^ )]+", message)) >= 2


@pytest.mark.parametrize("place", [1, 44])
def test_one_image_of_another_type_is_found_in_a_small_set(tmp_path: Path, place: int) -> None:
    for number in range(60):
        dtype = np.float32 if number == place else np.uint8
        np.save(tmp_path / f"{number:02}.npy", np.zeros((8, 8, 3), dtype))
    wanted = EncoderInput(channels=3, mean=(0.5,) * 3, std=(0.28,) * 3)
    with pytest.raises(ValueError, match=r"cannot mix: float32 .*uint8"):
        check_input(open_sets(str(tmp_path)), wanted, LIMIT)


def test_images_of_8_and_16_bits_share_a_batch(tmp_path: Path) -> None:
    for kind in ("uint8x1-255", "uint16x1-65535"):
        write_images(tmp_path / "images" / kind, kind)
    wanted = EncoderInput(channels=1, mean=(0.5,), std=(0.28,))
    assert check_input(open_sets(str(tmp_path / "images")), wanted, LIMIT) == []


def test_images_of_other_channels_are_named_with_the_option_that_leaves_them_out(
    tmp_path: Path,
) -> None:
    write_images(tmp_path / "images" / "bands", "uint16x5-3000")
    write_images(tmp_path / "images" / "labels", "uint8x1-255")
    fits = EncoderInput(channels=5, mean=(0.02,) * 5, std=(0.02,) * 5)
    # Pictures cannot have five channels: training would stop at the first.
    with pytest.raises(ValueError, match=r"such as labels/\d+\.png") as caught:
        check_input(open_sets(str(tmp_path / "images")), fits, LIMIT)
    assert "such as bands/" in str(caught.value)
    assert "--exclude" in str(caught.value)


def near_infrared(folder: Path, extension: str) -> Path:
    """Colour and near infrared, which the file calls alpha."""
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        values = values_of("uint8x4-255", number)
        if extension == "tif":
            tifffile = pytest.importorskip("tifffile")
            kinds = ("unassalpha", "assocalpha")
            tifffile.imwrite(
                folder / f"{number}.tif",
                values,
                photometric="rgb",
                extrasamples=[kinds[number % 2]],
            )
        else:
            Image.fromarray(values).save(folder / f"{number}.{extension}", lossless=True)
    return folder


@pytest.mark.parametrize("extension", ["tif", "png", "webp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_fourth_band_that_is_shown_as_transparency_is_pointed_out(
    tmp_path: Path, extension: str, channels: int
) -> None:
    folder = near_infrared(tmp_path / "images", extension)
    wanted = EncoderInput(channels=channels, mean=(0.6,) * channels, std=(0.28,) * channels)
    checks = findings(folder, wanted)
    assert checks.get("transparency") == (None if channels == 4 else "warning")
    texts = check_input(open_sets(str(folder)), wanted, LIMIT)
    said = " ".join(texts)
    assert ("12 of 12 images" in said) == (channels != 4)
    assert ("set encoder.in_channels to 4" in said) == (channels != 4)


def test_opaque_pictures_have_no_transparency(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", "uint8x3-255")
    for file in folder.iterdir():
        Image.open(file).convert("RGBA").save(file)
    assert findings(folder, PHOTOS) == {"channels": "ok", "statistics": "ok"}


@pytest.mark.parametrize("as_shards", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_measured_is_of_the_channels_that_are_trained_on(
    pretrain_values: dict[str, Any], tmp_path: Path, channels: int, as_shards: bool
) -> None:
    folder = make_set(tmp_path, "uint8x4-255", as_shards=as_shards)
    if as_shards:
        assert data_prep.cli.main(["info", str(folder), "--statistics"]) == 0
    pretrain_values["data"] |= {"shards": str(folder), "mean": "measured", "validation_shards": 0}
    pretrain_values["encoder"]["in_channels"] = channels
    recipe = parse(PretrainRecipe, pretrain_values, "test")
    stage = PretrainStage(recipe)
    data: Any = stage.recipe.data
    assert len(data.mean) == len(data.std) == channels
    if channels == 4:
        mean, std = truth("uint8x4-255")
        assert data.mean == pytest.approx(mean, rel=1e-3)
        assert data.std == pytest.approx(std, rel=1e-3)
        assert check_stage_input(stage) == []
    else:
        assert min(data.mean) > 0.6  # on white
        (warning,) = check_stage_input(stage, recipe)
        assert "transparency" in warning
        # Not what the recipe says already.
        assert "set encoder.in_channels to 4; data.mean and data.std, which are measured" in warning
        assert "to measured" not in warning


def test_a_folder_of_opaque_pictures_has_no_fourth_channel_to_measure(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "photos", "uint8x3-255")
    pretrain_values["data"] |= {"shards": str(folder), "mean": "measured", "validation_shards": 0}
    pretrain_values["encoder"]["in_channels"] = 4
    with pytest.raises(ValueError, match=r"set encoder\.in_channels to 3"):
        PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
