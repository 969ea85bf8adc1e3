"""Archives in archives, names from other systems, and bombs."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_prep.cli import main
from data_prep.format.index import read_images, read_index
from data_prep.format.manifest import read_manifest
from data_prep.format.storage import RemotePath
from data_prep.sources import unpacking
from data_prep.sources.files import Selection, SourceFile
from data_prep.sources.image_source import open_source
from data_prep.write.classes import class_name

KINDS = ("tar", "tar.gz", "tgz", "tar.bz2", "tbz2", "tar.xz", "txz", "TAR", "zip", "ZIP")
_COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def _pack(kind: str, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    if kind.lower() == "zip":
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(_with_name(name), data, method)
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for suffix, compress in _COMPRESSORS.items():
        if kind.endswith(suffix):
            return compress(stream.getvalue())
    return stream.getvalue()


def _with_name(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name  # as it is, with backslashes
    return info


def _files(path: Path) -> list[SourceFile]:
    with closing(open_source(path)) as source:
        return list(source.files())


@pytest.mark.parametrize("outer", KINDS)
def test_archives_in_archives_are_classes(
    outer: str, tmp_path: Path, image_files: dict[str, bytes]
) -> None:
    """Every kind in every other: the same bytes, and an archive counts as a folder."""
    data = iter(image_files.values())
    members, expected = {}, {}
    for number, inner in enumerate(KINDS):
        flat, deep = next(data), next(data)
        files = {"0.jpg": flat, "./owl/1.jpg": deep, "notes.txt": b"text"}
        members[f"part/c{number}.{inner}"] = _pack(inner, files)
        expected[f"part/c{number}.{inner}/0.jpg"] = (flat, f"c{number}")
        expected[f"part/c{number}.{inner}/owl/1.jpg"] = (deep, "owl")
    members["dog/2.jpg"] = image_files["train/dog/0.JPEG"]
    expected["dog/2.jpg"] = (members["dog/2.jpg"], "dog")
    path = tmp_path / f"a.{outer}"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        path.write_bytes(_pack(outer, members, method))
        with closing(open_source(path)) as source:
            files = [file for file in source.files() if Selection().wants(file)]
            found = {file.path: (source.read(file), class_name(file)) for file in files}
        assert found == expected


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip", "tgz"])
@pytest.mark.parametrize("options", [(), ("--no-shuffle",)])
def test_the_last_member_of_a_path_counts_as_in_unpacking(
    kind: str,
    options: tuple[str, ...],
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = [draw_image(number) for number in range(6)]
    inner = [_pack("tgz", {f"{number}.jpg": images[number]}) for number in (4, 5)]
    members = [
        ("cat/0.jpg", images[0]),
        ("./cat//0.jpg", images[1]),
        ("dog/0.jpg", images[2]),
        ("owls.tgz", inner[0]),
        ("cat/0.jpg", images[3]),
        ("owls.tgz", inner[1]),
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert main(["shard", str(path), str(tmp_path / "out"), *options, "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "out")
    found = {}
    for shard in manifest.shards:
        index = read_index(tmp_path / "out", shard)
        read = read_images(tmp_path / "out" / shard.name, index, np.arange(len(index)))
        found |= dict(zip(read, index.labels.tolist(), strict=True))
    assert [manifest.classes[found[images[number]]] for number in (3, 2, 5)] == [
        "cat",
        "dog",
        "owls",
    ]
    assert manifest.samples == len(found) == 3
    assert manifest.skipped == {"replaced by a later member of the same path": 3}
    assert "replaced by a later member of the same path (3)" in capsys.readouterr().out


def test_three_levels_are_read_and_a_fourth_is_refused(
    tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    data = _pack("zip", {"0.jpg": draw_image(0)})
    for level, kind in enumerate(("tgz", "zip", "tar", "tar.xz", "zip")):
        name = f"a{level}.{('zip', 'tgz', 'zip', 'tar', 'tar.xz')[level]}"
        data = _pack(kind, {name: data, f"{level}.jpg": draw_image(level)})
    (tmp_path / "a.zip").write_bytes(data)
    found = {file.path: file.problem for file in _files(tmp_path / "a.zip")}
    assert found == {
        "4.jpg": "",
        "a4.tar.xz/3.jpg": "",
        "a4.tar.xz/a3.tar/2.jpg": "",
        "a4.tar.xz/a3.tar/a2.zip/1.jpg": "",
        "a4.tar.xz/a3.tar/a2.zip/a1.tgz": "it is in more than 3 other archives",
    }


def _labels(folder: Path) -> dict[str, int]:
    manifest = read_manifest(folder)
    counts = dict.fromkeys(manifest.classes, 0)
    for shard in manifest.shards:
        for label in read_index(folder, shard).labels.tolist():
            counts[manifest.classes[label]] += 1
    return counts


@pytest.mark.parametrize("options", [(), ("--no-shuffle",), ("--deduplicate", "--workers", "2")])
def test_compressed_tars_become_shards(
    tmp_path: Path, image_files: dict[str, bytes], options: tuple[str, ...]
) -> None:
    folders = {path.removeprefix("train/"): data for path, data in image_files.items()}
    inner = {path: data for path, data in folders.items() if path.startswith("dog/")}
    outer = {path: data for path, data in folders.items() if path.startswith("cat/")}
    outer |= {"owl.tgz": _pack("tgz", {f"{n}.png": folders[f"owl/{n}.png"] for n in range(6)})}
    outer |= {"b.zip": _pack("zip", inner), "c.tar.zst": b"\x28\xb5\x2f\xfd", "d.rar": b"Rar!"}
    (tmp_path / "a.tar.gz").write_bytes(_pack("tar.gz", outer))
    command = ["shard", str(tmp_path / "a.tar.gz"), str(tmp_path / "out"), *options]
    assert main(command) == 0
    assert _labels(tmp_path / "out") == {"cat": 6, "dog": 6, "owl": 6}
    assert read_manifest(tmp_path / "out").skipped == {".tar.zst": 1, ".rar": 1}
    assert not (tmp_path / "out" / ".partial").exists()
    assert main(command) == 0  # already complete: the same fingerprint
    assert not (tmp_path / "out" / ".partial").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_backslashes_separate_folders(
    kind: str, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    """Zips written by .NET once had no classes at all."""
    names = ["set\\cat\\0.jpg", "set\\dog\\1.JPG", ".\\cat\\2.jpg", "dog/3.jpg", "..\\4.jpg"]
    files = {"set\\": b"", "set\\cat\\": b""} if kind == "zip" else {}
    files |= {name: draw_image(number) for number, name in enumerate(names)}
    path = tmp_path / f"a.{kind}"
    path.write_bytes(_pack(kind, files))
    found = {file.path: (class_name(file), file.problem) for file in _files(path)}
    assert found == {
        "set/cat/0.jpg": ("cat", ""),
        "set/dog/1.JPG": ("dog", ""),
        "cat/2.jpg": ("cat", ""),
        "dog/3.jpg": ("dog", ""),
        "../4.jpg": (None, "its path leads out of the archive"),
    }
    assert main(["shard", str(path), str(tmp_path / "out"), "--max-rejected", "0.5"]) == 0
    assert _labels(tmp_path / "out") == {"cat": 2, "dog": 2}


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "csv", "list of backslashes"])
def test_empty_parts_of_a_path_are_no_class(
    kind: str, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    names = ["a//1.jpg", "a/./2.jpg", "a\\\\3.jpg", ".//a/5.jpg", "././a/6.jpg", "a/.//./7.jpg"]
    files = {name: draw_image(number) for number, name in enumerate(names)}
    path = tmp_path / ("a.csv" if "list" in kind or kind == "csv" else f"a.{kind}")
    if path.suffix == ".csv":
        for name, data in files.items():
            place = tmp_path / name.replace("\\", "/")
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
        rows = [name.replace("/", "\\") if "list" in kind else name for name in names]
        path.write_text("\n".join(["path", *rows]))
    else:
        path.write_bytes(_pack(kind, files))
    assert [(class_name(file), file.problem) for file in _files(path)] == [("a", "")] * len(names)
    for order in ((), ("--no-shuffle",)):
        out = tmp_path / f"out{len(order)}"
        assert main(["shard", str(path), str(out), "--workers", "1", *order]) == 0
        assert _labels(out) == {"a": len(names)}


def test_damaged_archives_in_an_archive_are_rejected_by_name(
    tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    image = draw_image(0)
    whole = {kind: _pack(kind, {"0.jpg": image}) for kind in ("tar", "tgz", "tar.xz", "zip")}
    cut = {
        f"{kind}/cut.{kind}": data[: min(len(data) * 2 // 3, 900)] for kind, data in whole.items()
    }
    other = {"other.tgz": gzip.compress(b"no tar at all"), "zstd.tar": b"\x28\xb5\x2f\xfd"}
    flipped = bytearray(whole["tgz"])
    flipped[-6] ^= 1
    members = {"good/0.jpg": image, **cut, **other, "flipped.tgz": bytes(flipped)}
    for kind in ("tar", "zip"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(_pack(kind, members))
        files = [file for file in _files(path) if Selection().wants(file)]
        problems = {file.path: file.problem for file in files if file.problem}
        assert problems.pop("tar/cut.tar/0.jpg") == "the tar it is in is cut before its end"
        assert set(problems) == {*cut, *other, "flipped.tgz"}
        assert "zstd -d" in problems["zstd.tar"]
        assert all("damaged" in problem for name, problem in problems.items() if name != "zstd.tar")


@pytest.mark.parametrize("order", [[], ["--no-shuffle"], ["--part", "1/1"]])
def test_an_archive_that_cannot_be_read_is_not_one_image_of_many(
    order: list[str],
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = {f"{number}.jpg": draw_image(number) for number in range(40)}
    members = {"c0.tar": _pack("tar", images), "c1.tgz": _pack("tgz", images)[:-40]}
    (tmp_path / "a.tar").write_bytes(_pack("tar", members))
    command = ["shard", str(tmp_path / "a.tar"), str(tmp_path / "out"), "--workers", "1", *order]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("c1.tgz", "--max-rejected 1", "--exclude", "damaged"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    for number, choice in enumerate((["--max-rejected", "1"], ["--exclude", "c1.tgz*"])):
        other = [*command[:2], str(tmp_path / f"out{number}"), *command[3:], *choice]
        assert main(other) == 0
        if "--part" in order:
            assert main(["merge", other[2], *choice[: 2 * (number == 0)]]) == 0
        manifest = read_manifest(tmp_path / f"out{number}")
        assert (manifest.samples, manifest.rejected) == (40, 1 - number)


def test_bombs_are_refused(
    tmp_path: Path, draw_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one long archive nor many that overlap fill the disk."""
    monkeypatch.setattr(unpacking, "MIN_LIMIT", 2**20)
    monkeypatch.setattr(unpacking, "MAX_RATIO", 2)
    image = draw_image(0)
    bomb = {"zeros.jpg": bytes(4 * 2**20)}
    for kind in ("tgz", "tar.bz2", "tar.xz", "zip"):
        members = {"0.jpg": image, f"bomb.{kind}": _pack(kind, {"a.zip": _pack("zip", bomb)})}
        members[f"bomb2.{kind}"] = _pack(kind, {"b.tar": _pack("tar", bomb)})
        (tmp_path / "a.tar").write_bytes(_pack("tar", members))
        files = _files(tmp_path / "a.tar")
        assert files[0].problem == ""
        assert sum("decompression bomb" in file.problem for file in files) == 1
    (tmp_path / "b.tar.gz").write_bytes(_pack("tgz", bomb))
    assert main(["shard", str(tmp_path / "b.tar.gz"), str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob("out/**/unpacked-*"))


def test_an_archive_that_holds_itself_ends(tmp_path: Path) -> None:
    """All members of a hostile zip may lie at one place: their lengths together are limited."""
    inner = _pack("zip", {"x.txt": bytes(10**6)}, zipfile.ZIP_STORED)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a0.zip", inner)
        (first,) = archive.filelist
        for number in range(1, 2_000):
            again = zipfile.ZipInfo(f"a{number}.zip")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = len(inner)
            archive.filelist.append(again)
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    problems = [file.problem for file in _files(tmp_path / "a.zip") if file.problem]
    assert 0 < len(problems) < 2_000
    assert all("decompression bomb" in problem for problem in problems)


def test_a_tar_is_not_taken_for_a_compressed_one_by_the_name_of_its_first_member(
    tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    inner = _pack("tar", {"]": b"x", "0.jpg": draw_image(0)})
    members = {"BZh9.jpg": draw_image(1), "a.tar": inner, "a.tar.lzma": lzma.compress(inner, 2)}
    (tmp_path / "a.tar").write_bytes(_pack("tar", members))
    found = [file.path for file in _files(tmp_path / "a.tar") if not file.problem]
    assert found == ["BZh9.jpg", "a.tar/]", "a.tar/0.jpg", "a.tar.lzma/]", "a.tar.lzma/0.jpg"]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives_in_archives_of_a_store(
    kind: str, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    files = {"0.jpg": draw_image(0), "1.jpg": draw_image(1)}
    members = {f"c{number}.{inner}": _pack(inner, files) for number, inner in enumerate(KINDS)}
    place = RemotePath(f"memory://archives/a.{kind}")
    place.write_bytes(_pack(kind, members))
    assert main(["shard", str(place), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert _labels(tmp_path / "out") == {f"c{number}": 2 for number in range(len(KINDS))}
    fsspec.filesystem("memory").store.clear()


def test_a_zip_that_is_cut_behind_a_zip_inside_is_not_taken_for_that(
    tmp_path: Path, image_files: dict[str, bytes]
) -> None:
    """The table of an inner zip, stored near the end, is found in place of the missing one."""
    names = list(image_files)[:4]
    inner = _pack("zip", {name: image_files[name] for name in names[2:]})
    files = {name: image_files[name] for name in names[:2]}
    whole = _pack("zip", {**files, "in.zip": inner}, zipfile.ZIP_STORED)
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" + whole)  # a prefix is allowed
    assert len(_files(tmp_path / "a.zip")) == 4
    for length in range(whole.index(inner), len(whole), 7):
        (tmp_path / "a.zip").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut or damaged zip"):
            _files(tmp_path / "a.zip")
        outer = _pack("zip", {"cut.zip": whole[:length], "0.jpg": files[names[0]]})
        (tmp_path / "b.zip").write_bytes(outer)
        problems = {file.path: file.problem for file in _files(tmp_path / "b.zip")}
        assert problems == {"cut.zip": "it is a cut or damaged archive", "0.jpg": ""}
