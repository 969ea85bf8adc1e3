"""Building sets: every image once, readable by stock webdataset, deterministic bytes."""

import fcntl
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.format.index import index_tar, read_index
from data_prep.format.manifest import Manifest, read_manifest
from data_prep.sources.files import Selection, SourceError
from data_prep.write import output_dir
from data_prep.write.build import build_shards, merge_parts
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import OutputDirError
from data_prep.write.progress import Progress

OPTIONS = ShardOptions(samples_per_shard=5)


@dataclass(frozen=True, kw_only=True)
class _Complete:
    manifest: Manifest
    found: int
    was_complete: bool


def _build(
    source: Path, folder: Path, options: ShardOptions = OPTIONS, workers: int = 1, **rest: Any
) -> _Complete:
    run = RunOptions(workers=workers)
    built = build_shards(source, folder, options, run=run, **rest)
    assert built.manifest is not None
    return _Complete(manifest=built.manifest, found=built.found, was_complete=built.was_complete)


def _hash_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _read_stock(folder: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from webdataset import WebDataset

        urls = sorted(str(path) for path in folder.glob("*.tar"))
        return list(WebDataset(urls, shardshuffle=False))


def _read_indexed(folder: Path) -> list[tuple[str, str, int, bytes]]:
    manifest = read_manifest(folder)
    samples = []
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        index = read_index(folder, shard)
        for row in range(len(index)):
            start = int(index.offsets[row])
            image = data[start : start + int(index.sizes[row])]
            key, extension = str(index.keys[row]), str(index.extensions[row])
            samples.append((key, extension, int(index.labels[row]), image))
    return samples


@pytest.mark.parametrize("kind", ["image_folder", "image_zip", "image_tar"])
def test_stock_webdataset_and_our_index_read_every_image_once(
    kind: str, image_files: dict[str, bytes], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    folder = tmp_path / "deep" / "out"
    built = _build(source, folder)
    manifest = read_manifest(folder)
    assert manifest == built.manifest
    assert built.found == manifest.samples == len(image_files)
    assert manifest.classes == ("cat", "dog", "owl")
    assert [shard.samples for shard in manifest.shards] == [4, 5, 5, 5, 5]
    stock = _read_stock(folder)
    seen = {}
    for sample, (key, extension, label, image) in zip(stock, _read_indexed(folder), strict=True):
        about = json.loads(sample["json"])
        seen[about["path"]] = sample[extension]
        assert sample["__key__"] == key
        assert "." not in key
        assert sample[extension] == image
        assert int(sample["cls"]) == label
        assert manifest.classes[label] == Path(about["path"]).parent.name
        assert (about["width"], about["height"], about["source"]) == (28, 24, source.name)
    assert seen == image_files
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        *(shard.name for shard in manifest.shards),
        *(shard.index for shard in manifest.shards),
    }


def test_bytes_do_not_depend_on_run_or_workers(image_zip: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2), ("again", 1)):
        _build(image_zip, tmp_path / name, workers=workers)
    assert (
        _hash_files(tmp_path / "one")
        == _hash_files(tmp_path / "two")
        == _hash_files(tmp_path / "again")
    )


def test_seed_and_order(image_zip: Path, image_files: dict[str, bytes], tmp_path: Path) -> None:
    def paths(name: str, **options: Any) -> list[str]:
        _build(image_zip, tmp_path / name, ShardOptions(**options))
        return [json.loads(sample["json"])["path"] for sample in _read_stock(tmp_path / name)]

    shuffled, reseeded, plain = paths("a"), paths("b", seed=1), paths("c", shuffle=False)
    assert sorted(shuffled) == sorted(reseeded) == sorted(image_files)
    assert plain == list(image_files), "in the order of the zip"
    assert len({tuple(shuffled), tuple(reseeded), tuple(plain)}) == 3


def test_images_at_the_top_have_no_class(tmp_path: Path, draw_image: Callable[..., bytes]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(draw_image(0))
    built = _build(tmp_path / "in", tmp_path / "out")
    (sample,) = _read_stock(tmp_path / "out")
    assert built.manifest.classes == ()
    assert "cls" not in sample
    assert read_index(tmp_path / "out", built.manifest.shards[0]).labels.tolist() == [-1]


def test_bad_images_are_named_and_the_others_kept(image_folder: Path, tmp_path: Path) -> None:
    whole = (image_folder / "train/cat/0.jpg").read_bytes()
    (image_folder / "train/cat/0.jpg").write_bytes(whole[: len(whole) // 2])
    (image_folder / "train/cat/1.jpg").write_bytes(b"some text")
    (image_folder / "train/cat/2.jpg").write_bytes(b"")
    built = _build(image_folder, tmp_path / "out")
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rejected = {line["path"]: line["reason"] for line in map(json.loads, lines)}
    assert list(rejected) == [f"train/cat/{number}.jpg" for number in range(3)]
    assert "it cannot be decoded" in rejected["train/cat/0.jpg"]
    assert built.manifest.rejected == 3
    assert built.manifest.samples + 3 == built.found == 24
    assert len(_read_stock(tmp_path / "out")) == 21


def test_shards_of_bad_images_leave_no_gap(image_folder: Path, tmp_path: Path) -> None:
    options = ShardOptions(samples_per_shard=1, shuffle=False)
    (image_folder / "train/cat/0.jpg").write_bytes(b"some text")
    _build(image_folder, tmp_path / "out", options)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == [f"shard-{number:06d}.tar" for number in range(23)]
    assert len(_read_stock(tmp_path / "out")) == len(_read_indexed(tmp_path / "out")) == 23


@pytest.mark.parametrize("before", ["absent", "empty", "full"])
def test_nothing_is_left_if_no_image_can_be_used(
    before: str, image_zip: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"some text")
    folder = tmp_path / "new" / "out"
    if before != "absent":
        folder.mkdir(parents=True)
    if before == "full":
        _build(image_zip, folder)
    digests = _hash_files(tmp_path)
    with pytest.raises(SourceError, match=r"a\.jpg: it is not an image"):
        _build(tmp_path / "bad", folder, overwrite=before == "full")
    assert _hash_files(tmp_path) == digests
    assert folder.exists() == (before != "absent")
    assert folder.parent.exists() == (before != "absent")


def test_an_interrupted_run_resumes_where_it_stopped(image_zip: Path, tmp_path: Path) -> None:
    _build(image_zip, tmp_path / "whole")
    ticks: list[int] = []

    def interrupt_in_third_shard(samples: int) -> None:
        ticks.append(samples)
        if sum(ticks) == 12:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        _build(image_zip, folder, progress=Progress(tick=interrupt_in_third_shard))
    (folder / ".partial" / ".shard-000002.tar.partial-1").write_bytes(b"left by a killed process")
    assert [path.name for path in folder.iterdir()] == [".partial"]
    with pytest.raises(OutputDirError, match=r"interrupted run.*seed 0 \(now 1\)"):
        _build(image_zip, folder, ShardOptions(samples_per_shard=5, seed=1))
    ticks.clear()
    _build(image_zip, folder, progress=Progress(tick=ticks.append))
    assert sum(ticks) == 24 - 4 - 5
    assert _hash_files(folder) == _hash_files(tmp_path / "whole")


def test_a_finished_set_is_neither_rewritten_nor_replaced_without_overwrite(
    image_zip: Path, image_tar: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert not _build(image_zip, folder).was_complete
    digests = _hash_files(folder)
    assert _build(image_zip, folder).was_complete
    for source, options in ((image_zip, ShardOptions(samples_per_shard=4)), (image_tar, OPTIONS)):
        with pytest.raises(OutputDirError, match="--overwrite"):
            _build(source, folder, options)
    assert _hash_files(folder) == digests
    _build(image_zip, folder, ShardOptions(samples_per_shard=24), overwrite=True)
    assert len(read_manifest(folder).shards) == len(list(folder.glob("*.tar"))) == 1
    _build(image_zip, folder, overwrite=True)
    assert _hash_files(folder) == digests


def test_foreign_content_is_left_alone(image_zip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("notes.txt", "shard-000000.tar"):
        (folder / name).write_bytes(b"mine")
        with pytest.raises(OutputDirError, match=name):
            _build(image_zip, folder, overwrite=True)
        assert (folder / name).read_bytes() == b"mine"
        (folder / name).unlink()
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputDirError, match="is a file"):
        _build(image_zip, tmp_path / "file")


@pytest.mark.parametrize("window", [None, 1])
def test_work_of_another_version_is_refused_without_overwrite(
    image_zip: Path, tmp_path: Path, window: int | None
) -> None:
    def stop(report: object) -> None:
        raise KeyboardInterrupt

    folder, options = tmp_path / "out", ShardOptions(samples_per_shard=5, shuffle_window=window)
    with pytest.raises(KeyboardInterrupt):
        _build(image_zip, folder, options, progress=Progress(finished=stop))
    note = folder / ".partial" / "made-from.json"
    note.write_text(json.dumps(json.loads(note.read_text())["identity"]))  # as it once was
    (report,) = (folder / ".partial").glob("*.report.json")
    values = json.loads(report.read_text())
    del values["listing"]
    report.write_text(json.dumps(values))
    before = _hash_files(folder)
    for attempt in (lambda: _build(image_zip, folder, options), lambda: merge_parts(folder)):
        with pytest.raises(OutputDirError, match=r"another version of data-prep.*--overwrite"):
            attempt()
    assert _hash_files(folder) == before
    _build(image_zip, folder, options, overwrite=True)
    _build(image_zip, tmp_path / "whole", options)
    assert _hash_files(folder) == _hash_files(tmp_path / "whole")


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("place", ["out", "train/cat/out", "../link/out", "../elsewhere/out", "."])
def test_an_output_folder_in_the_source_is_refused(
    image_folder: Path, tmp_path: Path, place: str, window: int | None
) -> None:
    (tmp_path / "link").symlink_to(image_folder)
    (tmp_path / "elsewhere").mkdir()
    if "elsewhere" in place:
        (image_folder / "linked").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    options = ShardOptions(samples_per_shard=5, shuffle_window=window)
    with pytest.raises(ValueError, match=r"outside of the source"):
        _build(image_folder, image_folder / place, options)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_url_in_a_remote_source_is_refused(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("memory://bucket/images/out", "memory://bucket/images"):
        assert main(["shard", "memory://bucket/images", place]) == 2
        assert "outside of the source" in capsys.readouterr().err


def test_no_check_reads_headers_only(image_folder: Path, tmp_path: Path) -> None:
    path = image_folder / "train/cat/0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert _build(image_folder, tmp_path / "a").manifest.rejected == 1
    options = ShardOptions(samples_per_shard=5, check=False)
    assert _build(image_folder, tmp_path / "b", options).manifest.rejected == 0
    options = ShardOptions(selection=Selection(include=("train/cat/0.jpg",)), max_pixels=100)
    with pytest.raises(SourceError, match="--max-pixels 100"):
        _build(image_folder, tmp_path / "c", options)


def test_indexes_say_what_a_reader_of_the_tars_finds(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "top.jpg").write_bytes((image_folder / "train/cat/0.jpg").read_bytes())
    manifest = _build(image_folder, tmp_path / "out").manifest
    for shard in manifest.shards:
        found = index_tar(tmp_path / "out" / shard.name, lambda _: None)
        index = read_index(tmp_path / "out", shard)
        assert found.entry(shard.name) == shard
        for name, column in vars(found.index).items():
            assert (column == getattr(index, name)).all()


def test_a_set_completed_by_another_start_meanwhile_is_kept(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first check of the folder and its lock, another process writes the set."""
    folder = tmp_path / "shards"
    open_now = output_dir.open_output_dir

    def open_late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr("data_prep.write.build.open_output_dir", open_now)
        _build(image_folder, folder)
        return open_now(*arguments, **options)

    monkeypatch.setattr("data_prep.write.build.open_output_dir", open_late)
    with pytest.raises(OutputDirError, match="finished set"):
        _build(image_folder, folder, ShardOptions(samples_per_shard=7))
    assert {shard.samples for shard in read_manifest(folder).shards} == {5, 4}
    shutil.rmtree(folder)
    monkeypatch.setattr("data_prep.write.build.open_output_dir", open_late)
    assert _build(image_folder, folder).was_complete


def test_a_lock_that_another_run_removes_with_its_folder_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "shards" / ".partial"
    lock_now, calls = fcntl.flock, list[int]()

    def lock_late(file: Any, operation: int) -> None:
        if not calls:
            shutil.rmtree(partial)  # the run that held the lock ends
        calls.append(operation)
        lock_now(file, operation)

    monkeypatch.setattr("data_prep.write.output_dir.fcntl.flock", lock_late)
    with output_dir.open_output_dir(tmp_path / "shards"):
        second = output_dir.open_output_dir(tmp_path / "shards")
        with pytest.raises(OutputDirError, match="another data-prep"), second:
            pytest.fail("two runs write at once")
