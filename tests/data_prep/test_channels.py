"""Names of channels: how they are read and matched, and what manifests and files say of them."""

import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_prep.cli
from data_prep.channels import (
    RGB,
    AdaptRule,
    ChannelNameError,
    channel_sources,
    choose,
    compare_names,
    read_names,
)
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.statistics_file import read_statistics
from data_prep.images.channel_names import names_in_file, no_data_in_file

FIRES = ("blue", "green", "red", "nir", "swir2")


def arrays(folder: Path, bands: int = 5, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        np.save(folder / f"{number}.npy", rng.integers(0, 9, (8, 8, bands), dtype=np.uint16))
    return folder


def run(*arguments: object) -> int:
    return data_prep.cli.main([str(one) for one in arguments])


def manifest_values(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return values


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("B2,B3,B4,B8,B12", FIRES),
        ("b02 B03 B4 b08 b12", FIRES),
        ("rgb", RGB),
        ("Grey", ("gray",)),
        ("ct", ("ct",)),
        (["near infrared", "my_band2"], ("nir", "my_band2")),
        ("B8A,B11", ("narrow_nir", "swir1")),
    ],
)
def test_names_are_written_one_way(given: str, names: tuple[str, ...]) -> None:
    assert read_names(given) == names
    assert read_names(names) == names


@pytest.mark.parametrize("given", ["", "red,red", "B4,red", "rot?", []])
def test_what_is_no_list_of_names_is_refused(given: str) -> None:
    with pytest.raises(ChannelNameError):
        read_names(given)


def test_channels_are_chosen_by_name() -> None:
    choice = choose(FIRES, RGB)
    assert choice is not None
    assert (choice.count, choice.order) == (5, (2, 1, 0))
    pixels = np.arange(10).reshape(1, 2, 5)
    assert choice.take(pixels).tolist() == [[[2, 1, 0], [7, 6, 5]]]
    assert choose(FIRES, FIRES) is choose(None, RGB) is choose(("gray",), RGB) is None
    with pytest.raises(ChannelNameError, match=r"\[red, green, blue\] lack nir"):
        choose(RGB, ("nir",))


def test_differences_are_named() -> None:
    assert compare_names(RGB, RGB) == ""
    assert compare_names(("blue", "green", "red"), RGB) == "the same in another order"
    assert compare_names(("red", "nir"), RGB) == "missing green, blue, additional nir"


@pytest.mark.parametrize(
    ("rule", "new"),
    [("repeat", [(0,), (1,)]), ("average", [(0, 1, 2)] * 2), ("zero", [(), ()])],
)
def test_new_channels_start_by_the_rule(rule: AdaptRule, new: list[tuple[int, ...]]) -> None:
    assert channel_sources(RGB, FIRES, rule) == ((2,), (1,), (0,), *new)


def test_a_set_of_arrays_has_the_names_that_are_given(tmp_path: Path) -> None:
    source = arrays(tmp_path / "images")
    assert run("shard", source, tmp_path / "named", "--channels", "B2,B3,B4,B8,B12") == 0
    assert run("shard", source, tmp_path / "plain") == 0
    assert read_manifest(tmp_path / "named").channels == FIRES
    named, plain = (manifest_values(tmp_path / name) for name in ("named", "plain"))
    assert "channels" not in plain
    assert not {"channels", "no_data"} & plain["options"].keys()
    assert named["options"].pop("channels") == list(FIRES)
    assert named["options"] == plain["options"]
    assert named["fingerprint"] == plain["fingerprint"]
    assert named["shards"] == plain["shards"]


def test_images_of_another_number_of_channels_are_rejected(tmp_path: Path) -> None:
    source = arrays(tmp_path / "images")
    np.save(source / "four.npy", np.zeros((8, 8, 4), np.uint16))
    assert run("shard", source, tmp_path / "set", "--channels", "B2,B3,B4,B8,B12") == 2
    arguments = ("--channels", "B2,B3,B4,B8,B12", "--max-rejected", "1")
    assert run("shard", source, tmp_path / "set", *arguments) == 0
    (line,) = (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == (
        "it has 4 channels, and the set names 5: [blue, green, red, nir, swir2]"
    )


def test_names_are_checked_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("shard", tmp_path / "none", tmp_path / "set", "--channels", "red,red") == 2
    assert "red is given twice" in capsys.readouterr().err


def test_resharding_keeps_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = arrays(tmp_path / "images")
    options = ("--channels", "B2,B3,B4,B8,B12", "--no-data", "0")
    assert run("shard", source, tmp_path / "set", *options) == 0
    assert run("reshard", tmp_path / "set", tmp_path / "again", "--seed", "1") == 0
    again = read_manifest(tmp_path / "again")
    assert (again.channels, again.no_data) == (FIRES, 0)
    other = ("--channels", "red,green,blue,nir,swir2")
    assert run("reshard", tmp_path / "set", tmp_path / "other", *other) == 2
    assert "has channels [blue, green, red, nir, swir2]" in capsys.readouterr().err


def test_tars_are_indexed_with_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("shard", arrays(tmp_path / "images"), tmp_path / "set") == 0
    (tmp_path / "set" / "manifest.json").unlink()
    arguments = ("index", tmp_path / "set", "--overwrite")
    assert run(*arguments, "--channels", "B2,B3,B4") == 2
    assert "it has 5 channels, and the set names 3" in capsys.readouterr().err
    assert run(*arguments, "--channels", "B2,B3,B4,B8,B12", "--no-data", "0") == 0
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.channels, manifest.no_data) == (FIRES, 0)
    assert run("info", tmp_path / "set") == 0
    out = capsys.readouterr().out
    assert "names       blue, green, red, nir, swir2" in out
    assert "no data     0" in out


@pytest.mark.parametrize(
    ("modes", "names"), [(["L"], ("gray",)), (["RGB"], RGB), (["L", "RGB"], RGB)]
)
def test_pictures_tell_their_colours(
    tmp_path: Path, modes: list[str], names: tuple[str, ...]
) -> None:
    (tmp_path / "images").mkdir()
    for number, mode in enumerate(modes):
        for suffix in ("png", "jpg"):
            image = Image.new(mode, (8, 8), 30 + number)
            image.save(tmp_path / "images" / f"{number}.{suffix}")
    assert run("shard", tmp_path / "images", tmp_path / "set") == 0
    manifest = manifest_values(tmp_path / "set")
    assert manifest["channels"] == list(names)
    assert "channels" not in manifest["options"]


def write_tiff(path: Path, values: np.ndarray, names: list[str] | None, no_data: str = "") -> None:
    tifffile = pytest.importorskip("tifffile")
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{number}" role="description">{name}</Item>'
        for number, name in enumerate(names or ())
    )
    tags = [(42112, 2, 0, f"<GDALMetadata>{items}</GDALMetadata>", True)] if names else []
    tags += [(42113, 2, 0, no_data, True)] if no_data else []
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig", extratags=tags)


def test_tiffs_tell_the_descriptions_of_their_bands(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    values = np.arange(8 * 8 * 5, dtype=np.uint16).reshape(8, 8, 5)
    write_tiff(source / "a.tif", values, ["B2", "B3", "B4", "B8", "B12"], "7")
    data = (source / "a.tif").read_bytes()
    told = names_in_file(data, "tif")
    assert told is not None
    assert (told.names, told.described, no_data_in_file(data)) == (FIRES, True, 7)
    assert run("shard", source, tmp_path / "set") == 0
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.channels, manifest.no_data) == (FIRES, 7)
    assert "channels" not in manifest.options


@pytest.mark.parametrize("names", [["B2", "B2", "B4"], ["B2", "B3"], None])
def test_bands_without_names_of_their_own_tell_nothing(
    tmp_path: Path, names: list[str] | None
) -> None:
    write_tiff(tmp_path / "a.tif", np.zeros((8, 8, 3), np.uint16), names)
    assert names_in_file((tmp_path / "a.tif").read_bytes(), "tif") is None


def test_files_of_other_bands_are_not_one_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "images"
    source.mkdir()
    values = np.zeros((8, 8, 3), np.uint16)
    write_tiff(source / "a.tif", values, ["red", "green", "nir"])
    write_tiff(source / "b.tif", values, ["nir", "green", "red"])
    assert run("shard", source, tmp_path / "set") == 2
    message = capsys.readouterr().err
    assert "1 image of [red, green, nir], as a.tif" in message
    assert "1 image of [nir, green, red], as b.tif" in message
    given = ("--channels", "red,green,nir", "--max-rejected", "1", "--overwrite")
    assert run("shard", source, tmp_path / "set", *given) == 0
    rejected = json.loads((tmp_path / "set" / "rejected.jsonl").read_text())
    assert rejected["path"] == "b.tif"
    assert rejected["reason"].endswith("the same in another order")


def test_statistics_leave_out_values_without_a_measurement(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    values = np.full((8, 8, 3), 10_000, np.uint16)
    values[:4, :, 0] = 0  # half of the first channel was not measured
    values[0, 0, 2] = 0
    values[4:, :, 1] = 30_000
    np.save(source / "a.npy", values)
    assert run("shard", source, tmp_path / "set", "--channels", "a,b,c", "--no-data", "0") == 0
    assert run("info", tmp_path / "set", "--statistics") == 0
    (found,) = read_statistics(read_manifest(tmp_path / "set"))
    assert found.values == (32, 64, 63)
    assert found.missing == 33
    np.testing.assert_allclose(np.array(found.mean) * 65535, [10_000, 20_000, 10_000])
    np.testing.assert_allclose(np.array(found.std) * 65535, [0, 10_000, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_no_data_of_every_type_is_left_out(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "images"
    source.mkdir()
    values = np.full((8, 8, 2), 100, kind)
    values[:2, :, 1] = 255 if kind == "uint8" else -9999
    if kind == "float32":
        values[2, :, 0] = np.nan
    np.save(source / "a.npy", values)
    no_data = "255" if kind == "uint8" else "-9999"
    assert run("shard", source, tmp_path / "set", f"--no-data={no_data}") == 0
    assert run("info", tmp_path / "set", "--statistics") == 0
    (found,) = read_statistics(read_manifest(tmp_path / "set"))
    assert found.values == ((64, 48) if kind == "uint8" else (56, 48))
    np.testing.assert_allclose(found.std, 0, atol=1e-6)


def test_bands_of_a_contact_sheet_have_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = arrays(tmp_path / "images")
    assert run("shard", source, tmp_path / "set", "--channels", "B2,B3,B4,B8,B12") == 0
    sheet = ("info", tmp_path / "set", "--contact-sheet", tmp_path / "sheet.png")
    assert run(*sheet) == 0
    assert "bands 2 (red), 1 (green), 0 (blue) as red, green, blue" in capsys.readouterr().out
    assert run(*sheet, "--bands", "nir", "B4", "1") == 0
    assert "bands 3 (nir), 2 (red), 1 (green) as" in capsys.readouterr().out
    assert run(*sheet, "--bands", "thermal") == 2
    assert "[blue, green, red, nir, swir2]; got thermal" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [["red", "red"], [], "red", [1], ["?"]])
def test_damaged_names_in_a_manifest_are_refused(tmp_path: Path, channels: object) -> None:
    assert run("shard", arrays(tmp_path / "images"), tmp_path / "set") == 0
    values = manifest_values(tmp_path / "set") | {"channels": channels}
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ManifestError, match="channels"), warnings.catch_warnings():
        read_manifest(tmp_path / "set")


@pytest.mark.parametrize(
    ("suffix", "mode", "names", "accepted"),
    [
        ("jpg", "RGB", "nir,red,green", True),
        ("jpg", "RGB", "red,green,blue,nir", False),
        ("jpg", "L", "ct", True),
        ("jpg", "RGB", "ct", False),
        ("jpg", "L", "rgb", True),
        ("png", "RGBA", "red,green,blue,nir", True),
        ("png", "RGB", "red,green,blue,nir", False),
        ("png", "L", "ct", True),
        ("webp", "RGB", "nir,red,green", True),
        ("webp", "RGB", "a,b", False),
    ],
)
def test_pictures_have_as_many_channels_as_names(
    tmp_path: Path, suffix: str, mode: str, names: str, accepted: bool
) -> None:
    (tmp_path / "images").mkdir()
    Image.new(mode, (8, 8), 40).save(tmp_path / "images" / f"a.{suffix}")
    code = run("shard", tmp_path / "images", tmp_path / "set", "--channels", names)
    assert (code == 0) == accepted


def test_deep_verification_compares_every_image_with_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = arrays(tmp_path / "images")
    np.save(source / "9.npy", np.zeros((8, 8, 4), np.uint16))
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as tar:
        for file in sorted(source.iterdir()):
            tar.add(file, file.name)
    assert run("index", tmp_path / "set", "--channels", "B2,B3,B4,B8,B12") == 0
    assert run("verify", tmp_path / "set") == 0
    assert run("verify", tmp_path / "set", "--deep") == 2
    message = capsys.readouterr().err
    assert "a.tar: image 9: it has 4 channels, and the set names 5" in message
    assert message.count("image ") == 1
