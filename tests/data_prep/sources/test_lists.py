"""Lists, nested tars and other shards give the files they name, with labels, splits and fields."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.format.index import read_index
from data_prep.format.manifest import read_manifest
from data_prep.sources.files import Selection, SourceError, SourceFile
from data_prep.sources.image_source import open_source
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions


def _files(path: Path, **options: Any) -> list[SourceFile]:
    with closing(open_source(path, Selection(**options))) as source:
        return list(source.files())


def _samples(folder: Path) -> dict[str, tuple[dict[str, Any], str | None]]:
    """Path → JSON fields and class name of every sample, as stock tarfile reads them."""
    manifest = read_manifest(folder)
    samples = {}
    for shard in manifest.shards:
        with tarfile.open(folder / shard.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for row, key in enumerate(read_index(folder, shard).keys):
            about = json.loads(members[f"{key}.json"])
            label = int(read_index(folder, shard).labels[row])
            samples[about["path"]] = (about, manifest.classes[label] if label >= 0 else None)
    return samples


def test_a_text_list_names_paths_and_labels(image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("images/train/cat/0.jpg\tfeline\r\n\nimages/train/dog/0.JPEG\n")
    first, second = _files(path)
    assert (first.path, first.label) == ("images/train/cat/0.jpg", "feline")
    assert (second.path, second.label) == ("images/train/dog/0.JPEG", "")
    assert first.size == (image_folder / "train/cat/0.jpg").stat().st_size
    build_shards(path, tmp_path / "out", ShardOptions())
    assert {name for _, name in _samples(tmp_path / "out").values()} == {"feline", None}


def test_a_list_leads_nowhere_else(image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    lines = [
        "../images/a.jpg",
        "/etc/passwd",
        "gone.jpg",
        "train",
        "bad\0name.jpg",
        "train/cat/0.jpg",
    ]
    path.write_text("\n".join(lines))
    problems = {file.path: file.problem for file in _files(path, root=str(image_folder))}
    assert list(problems) == lines
    assert "leads out of the list's folder" in problems["../images/a.jpg"]
    assert "outside of the list's folder" in problems["/etc/passwd"]
    assert problems["gone.jpg"] == "it cannot be read: No such file or directory"
    assert problems["train"] == "it cannot be read: it is not a file"
    assert problems["bad\0name.jpg"]
    assert problems["train/cat/0.jpg"] == ""


def _write_csv(folder: Path) -> Path:
    path = folder / "list.csv"
    path.write_text(
        "path,label,split,place\n"
        "train/cat/0.jpg,cat,train,Kraków\n"
        'train/dog/0.JPEG,"dog, big",test,\n'
        "train/owl/0.png,,train,Oslo\n"
    )
    return path


def test_a_csv_gives_labels_splits_and_fields(image_folder: Path, tmp_path: Path) -> None:
    path = _write_csv(image_folder)
    build_shards(path, tmp_path / "all", ShardOptions())
    samples = _samples(tmp_path / "all")
    about, name = samples["train/cat/0.jpg"]
    assert (name, about["split"], about["place"]) == ("cat", "train", "Kraków")
    assert samples["train/dog/0.JPEG"][1] == "dog, big"
    assert read_manifest(tmp_path / "all").classes == ("cat", "dog, big")
    assert samples["train/owl/0.png"][1] is None
    options = ["--only-split", "train", "--workers", "1"]
    assert main(["shard", str(path), str(tmp_path / "train"), *options]) == 0
    assert set(_samples(tmp_path / "train")) == {"train/cat/0.jpg", "train/owl/0.png"}


def test_damaged_lists_are_named(tmp_path: Path, image_folder: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("name,label\na.jpg,1\n")
    with pytest.raises(SourceError, match="no column `path`"):
        _files(path)
    path.write_text("path,label\nimages/train/cat/0.jpg,1,2,3\n")
    assert [file.problem for file in _files(path)] == ["line 2 has 4 values for 2 columns"]
    path.write_text("path\n" + "x" * 200_000 + "\n")
    with pytest.raises(SourceError, match="damaged CSV, line 2"):
        _files(path)


def test_numbers_as_labels_stay_those_numbers(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "list.txt").write_text("train/cat/0.jpg\t10\ntrain/dog/0.JPEG\t2\n")
    manifest = build_shards(image_folder / "list.txt", tmp_path / "out", ShardOptions()).manifest
    assert manifest is not None
    assert manifest.classes == tuple(str(number) for number in range(11))


def test_parquet_reads_as_csv_does(image_folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        with pytest.raises(SourceError, match=r"pip install 'simmim\[parquet\]'"):
            _files(tmp_path / "a.parquet")
        return
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.csv.read_csv(_write_csv(image_folder))
    pyarrow.parquet.write_table(table, image_folder / "list.parquet", row_group_size=1)
    first, second = _files(image_folder / "list.csv"), _files(image_folder / "list.parquet")
    assert [file[:9] for file in first] == [file[:9] for file in second]
    assert json.loads(second[0].fields) == json.loads(first[0].fields)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SourceError, match="damaged Parquet"):
        _files(tmp_path / "a.parquet")


def test_a_tar_of_class_tars(
    image_files: dict[str, bytes], tmp_path: Path, write_tar: Callable[..., None]
) -> None:
    inner = {}
    for name in ("cat", "dog"):
        paths = [path for path in image_files if f"train/{name}/" in path]
        write_tar(
            tmp_path / "a.tar", {path[6:].replace("/", "_"): image_files[path] for path in paths}
        )
        inner[f"{name}.tar"] = (tmp_path / "a.tar").read_bytes()
    inner["owl.tar"] = inner["dog.tar"][:1500]
    write_tar(tmp_path / "outer.tar", {**inner, "readme.txt": b"text"})
    built = build_shards(tmp_path / "outer.tar", tmp_path / "out", ShardOptions())
    assert built.manifest is not None
    assert built.manifest.classes == ("cat", "dog")
    assert built.found == built.manifest.samples + built.manifest.rejected
    samples = _samples(tmp_path / "out")
    assert {name for path, (_, name) in samples.items() if path.startswith("cat.tar/")} == {"cat"}
    assert len(samples) == 12
    with closing(open_source(tmp_path / "outer.tar")) as source:
        file = next(file for file in source.files() if file.path == "dog.tar/dog_0.JPEG")
        assert source.read(file) == image_files["train/dog/0.JPEG"]


def test_reshard_keeps_labels_fields_and_keys(image_zip: Path, tmp_path: Path) -> None:
    build_shards(image_zip, tmp_path / "a", ShardOptions(samples_per_shard=5))
    arguments = ["--samples-per-shard", "12", "--seed", "3", "--workers", "1"]
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "b"), *arguments]) == 0
    before, after = _samples(tmp_path / "a"), _samples(tmp_path / "b")
    assert before.keys() == after.keys()
    assert len(read_manifest(tmp_path / "b").shards) == 2
    assert read_manifest(tmp_path / "a").classes == read_manifest(tmp_path / "b").classes
    for path, (about, name) in before.items():
        assert after[path][1] == name
        assert after[path][0] == {**about, "source": "a", "key": after[path][0]["key"]}


def test_reshard_of_shards_that_someone_else_wrote(
    tmp_path: Path, draw_image: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    (tmp_path / "a").mkdir()
    image = draw_image(0)
    members = {"x/1.jpg": image, "x/1.cls": b"7", "x/1.json": b'{"caption": "an owl", "path": 3}'}
    members |= {"2.png": draw_image(1, image_format="PNG"), "3.txt": b"text"}
    members |= {"4.jpg": image, "4.json": b"{", "5.jpg": image, "5.png": image}
    members |= {"6.npy": b"depth", "6.jpg": image}  # beside a picture an array is something else
    write_tar(tmp_path / "a" / "one.tar", members)
    built = build_shards(tmp_path / "a", tmp_path / "b", ShardOptions(), shards=True)
    samples = _samples(tmp_path / "b")
    about, name = samples["one.tar/x/1.jpg"]
    assert (about["caption"], about["key"], name) == ("an owl", "x/1", "7")
    assert samples["one.tar/2.png"][1] is None
    assert "one.tar/6.jpg" in samples
    assert samples["one.tar/4.jpg"][0]["notes"] == ["JSON left out: damaged"]
    assert built.manifest is not None
    assert built.manifest.notes["JSON left out: damaged"] == 1
    lines = (tmp_path / "b" / "rejected.jsonl").read_text().splitlines()
    assert {row["path"]: row["reason"] for row in map(json.loads, lines)} == {
        "one.tar/3": "its sample has no image",
        "one.tar/5.jpg": "its sample '5' has two images, jpg and png",
        "one.tar/5.png": "its sample '5' has two images, jpg and png",
    }
    assert built.found == len(samples) + 3
    with pytest.raises(SourceError, match="no tars"):
        build_shards(tmp_path, tmp_path / "c", ShardOptions(), shards=True)


def test_a_damaged_inner_tar_is_counted(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    stream = io.BytesIO(b"no tar at all" * 100)
    write_tar(tmp_path / "outer.tar", {"cat.tar": stream.getvalue()})
    (file,) = _files(tmp_path / "outer.tar")
    assert file.problem == "it is a cut, damaged or compressed tar"
    assert Selection().wants(file)
