"""`reshard` of a set takes the tars of its manifest, or refuses what is not as `verify` does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions

WriteTar = Callable[[Path, dict[str, bytes]], None]
_OTHER = "shard-000001.tar"


@pytest.fixture
def shards(image_zip: Path, tmp_path: Path) -> Path:
    """A set of four shards of six samples."""
    build_shards(image_zip, tmp_path / "set", ShardOptions(samples_per_shard=6))
    return tmp_path / "set"


def _remove(folder: Path, write_tar: WriteTar, image: bytes) -> None:
    (folder / _OTHER).unlink()


def _replace(folder: Path, write_tar: WriteTar, image: bytes) -> None:
    write_tar(folder / _OTHER, {"a.jpg": image, "a.cls": b"0"})


def _swap(folder: Path, write_tar: WriteTar, image: bytes) -> None:
    shutil.copy(folder / "shard-000002.tar", folder / _OTHER)


def _add(folder: Path, write_tar: WriteTar, image: bytes) -> None:
    write_tar(folder / "shard-000009.tar", {"a.jpg": image, "a.cls": b"0"})


@pytest.mark.parametrize("order", [[], ["--no-shuffle"]])
@pytest.mark.parametrize("damage", [_remove, _replace, _swap, _add])
def test_a_set_unlike_its_manifest_is_refused(
    damage: Callable[[Path, WriteTar, bytes], None],
    order: list[str],
    shards: Path,
    write_tar: WriteTar,
    image_files: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(shards, write_tar, image_files["train/cat/0.jpg"])
    assert main(["verify", str(shards), "--workers", "1"]) != 0
    command = ["reshard", str(shards), str(tmp_path / "out"), "--workers", "1", *order]
    assert main(command) == 2
    assert "shard-00000" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_tars_beside_an_indexed_set_are_counted(
    write_tar: WriteTar, image_files: dict[str, bytes], tmp_path: Path
) -> None:
    image = image_files["train/cat/0.jpg"]
    (tmp_path / "a").mkdir()
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / "a" / f"{name}.tar", {"a.jpg": image, "a.cls": b"3"})
    assert main(["index", str(tmp_path / "a"), "--include", "train-*.tar"]) == 0
    pattern = str(tmp_path / "a" / "*.tar")
    assert main(["reshard", pattern, str(tmp_path / "b"), "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.samples, len(manifest.classes)) == (2, 4)
    assert manifest.skipped == {"tars not in the manifest": 1}


def test_a_damaged_part_is_not_merged(
    image_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["shard", str(image_zip), str(out), "--samples-per-shard", "6", "--workers", "1"]
    for part in ("1/2", "2/2"):
        assert main([*command, "--part", part]) == 0
    path = out / ".partial" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[2_000] ^= 1
    path.write_bytes(data)
    assert main(["merge", str(out)]) == 2
    message = capsys.readouterr().err
    assert "shard-000001.tar" in message
    assert "shard-000001.report.json" in message
    (out / ".partial" / "shard-000001.report.json").unlink()
    assert main([*command, "--part", "2/2"]) == 0
    assert main(["merge", str(out)]) == 0
    assert main(["verify", str(out), "--workers", "1"]) == 0


def test_shard_names_the_command_for_tars(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in shards.glob("*.npy"):
        path.unlink()
    for name in ("", "shard-{000000..000001}.tar", "x-*.tar"):
        source = str(shards / name)
        assert main(["shard", source, str(tmp_path / "out")]) == 2
        assert "data-prep reshard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it has 0 bytes. Fetch"),
        (
            b"PK\x03\x04" + bytes(99),
            "is a cut or damaged zip: the table of its members, at its end",
        ),
    ],
)
def test_cut_zips_are_named(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.zip", "a"):
        (tmp_path / name).write_bytes(content)
        assert main(["shard", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err


def test_the_split_column_is_found_in_any_case(image_folder: Path, tmp_path: Path) -> None:
    rows = ["path,label,My Split", "train/cat/0.jpg,a,train", "train/cat/1.jpg,b,test"]
    (image_folder / "a.csv").write_text("\n".join(rows))
    for number, name in enumerate(("My Split", "my_split", "MY-SPLIT")):
        command = ["shard", str(image_folder / "a.csv"), str(tmp_path / f"out{number}")]
        assert main([*command, "--split-column", name, "--only-split", "train"]) == 0
        assert read_manifest(tmp_path / f"out{number}").classes == ("a",)


def test_the_split_field_is_found_in_any_case_and_may_be_a_number(
    write_tar: WriteTar, image_files: dict[str, bytes], tmp_path: Path
) -> None:
    image = image_files["train/cat/0.jpg"]
    (tmp_path / "a").mkdir()
    for field, wanted in (('"Split": "train"', "train"), ('"my-split": 1', "1")):
        members = {"a.jpg": image, "a.json": f"{{{field}}}".encode()}
        members |= {"b.jpg": image, "b.json": b'{"Split": "test", "my-split": 2}'}
        write_tar(tmp_path / "a" / "x-0.tar", members)
        out = tmp_path / f"out-{wanted}"
        name = "split" if wanted == "train" else "My_Split"
        command = ["reshard", str(tmp_path / "a"), str(out), "--workers", "1"]
        assert main([*command, "--only-split", wanted, "--split-column", name]) == 0
        assert read_manifest(out).samples == 1


@pytest.mark.parametrize("prefix", ["", "memory://bucket/"])
def test_a_finished_set_is_named_as_one(
    prefix: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(shards)
    if prefix:
        source = f"{prefix}set-{tmp_path.name}"
        command = ["reshard", str(shards), source, "--workers", "1"]
        assert main([*command, "--staging", str(tmp_path / "staging")]) == 0
    assert main(["shard", source, str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "is a finished set of shards already" in shown
    assert f"data-prep reshard {source} DST" in shown
    assert not (tmp_path / "out").exists()


def test_another_manifest_is_no_set(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "manifest.json").write_text('{"name": "a web page"}')
    assert main(["shard", str(image_folder), str(tmp_path / "out"), "--workers", "1"]) == 0


def test_an_index_of_tars_elsewhere_says_where_they_are(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "manifest.json").unlink()
    assert main(["index", str(shards), "--output", str(tmp_path / "index"), "--workers", "1"]) == 0
    assert main(["reshard", str(tmp_path / "index"), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert f"tars elsewhere, in {shards}. Reshard" in capsys.readouterr().err
