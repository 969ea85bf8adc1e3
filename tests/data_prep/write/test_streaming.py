"""Streamed listing: the same shards as from any other run."""

import itertools
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.format.manifest import read_manifest
from data_prep.format.tars import TarError
from data_prep.sources import folders
from data_prep.sources.files import Selection, SourceError
from data_prep.sources.folders import FolderSource
from data_prep.sources.image_source import open_source
from data_prep.write.build import build_shards, merge_parts
from data_prep.write.classes import find_classes
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import OutputDirError
from data_prep.write.plan import cut_stream, path_key
from data_prep.write.progress import Progress

WINDOWED = ShardOptions(samples_per_shard=5, shuffle_window=7, validation_fraction=0.2)
PLAIN = ShardOptions(samples_per_shard=5, shuffle=False)
BOTH = pytest.mark.parametrize("options", [WINDOWED, PLAIN], ids=["windowed", "plain"])


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _paths(folder: Path) -> list[str]:
    paths = []
    for shard in read_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            members = (tar.extractfile(member) for member in tar if member.name.endswith(".json"))
            paths += [json.loads(member.read())["path"] for member in members if member]
    return paths


@pytest.fixture
def mixed_folder(image_folder: Path) -> Path:
    """A folder in which some files are bad, found when listed or when read."""
    (image_folder / "train/cat/empty.jpg").touch()
    (image_folder / "train/dog/bad.jpg").write_bytes(b"some text")
    (image_folder / "train/broken.jpg").symlink_to("nowhere")
    return image_folder


@BOTH
def test_the_first_shard_is_there_before_all_is_listed(
    options: ShardOptions, mixed_folder: Path, tmp_path: Path
) -> None:
    events: list[str] = []
    progress = Progress(
        planned=lambda plan: events.append(f"planned {plan.found}"),
        counted=lambda found: events.append(f"counted {found}"),
        finished=lambda report: events.append(f"shard {report.number}"),
    )
    build_shards(mixed_folder, tmp_path / "out", options, progress=progress)
    assert events[:2] == ["planned None", "shard 0"]
    assert "counted 25" in events[3:]
    # What needs all files first says how many there are before it writes.
    events.clear()
    build_shards(mixed_folder, tmp_path / "all", ShardOptions(), progress=progress)
    assert events[:2] == ["planned 27", "shard 0"]


@BOTH
def test_bytes_do_not_depend_on_workers_parts_or_interruptions(
    options: ShardOptions, mixed_folder: Path, tmp_path: Path
) -> None:
    built = build_shards(mixed_folder, tmp_path / "one", options)
    assert built.manifest is not None
    assert (built.found, built.manifest.samples, built.manifest.rejected) == (27, 24, 3)
    whole = _files(tmp_path / "one")
    build_shards(mixed_folder, tmp_path / "two", options, run=RunOptions(workers=2))
    for part in (3, 1, 2):
        with pytest.raises(OutputDirError):
            merge_parts(tmp_path / "parts")
        run = RunOptions(part=(part, 3))
        assert build_shards(mixed_folder, tmp_path / "parts", options, run=run)
    merge_parts(tmp_path / "parts")
    ticks = 0

    def interrupt(samples: int) -> None:
        nonlocal ticks
        ticks += samples
        if ticks in (8, 18, 26):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            build_shards(
                mixed_folder, tmp_path / "stopped", options, progress=Progress(tick=interrupt)
            )
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [".partial"]
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "stopped/.partial").glob("*.tar")}
    assert kept
    build_shards(mixed_folder, tmp_path / "stopped", options)
    assert all((tmp_path / "stopped" / name).stat().st_ino == at for name, at in kept.items())
    for name in ("two", "parts", "stopped"):
        assert _files(tmp_path / name) == whole, name
    assert build_shards(mixed_folder, tmp_path / "stopped", options).was_complete


def test_order_and_classes_are_those_of_the_source(image_folder: Path, tmp_path: Path) -> None:
    build_shards(image_folder, tmp_path / "plain", PLAIN)
    in_order = sorted(_paths(tmp_path / "plain"))
    assert _paths(tmp_path / "plain") == in_order
    windowed = ShardOptions(samples_per_shard=5, shuffle_window=7)
    build_shards(image_folder, tmp_path / "windowed", windowed)
    shuffled = _paths(tmp_path / "windowed")
    assert shuffled != in_order
    assert sorted(shuffled) == in_order
    build_shards(image_folder, tmp_path / "all", ShardOptions())
    for name in ("plain", "windowed"):
        assert read_manifest(tmp_path / name).classes == read_manifest(tmp_path / "all").classes


@BOTH
def test_another_input_or_other_options_are_refused(
    options: ShardOptions,
    image_folder: Path,
    tmp_path: Path,
    draw_image: Callable[..., bytes],
) -> None:
    def stop(report: object) -> None:
        raise KeyboardInterrupt

    def build(options: ShardOptions = options, **rest: Any) -> None:
        build_shards(image_folder, tmp_path / "out", options, **rest)

    with pytest.raises(KeyboardInterrupt):
        build(progress=Progress(finished=stop))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/.partial").iterdir()}
    with pytest.raises(OutputDirError, match=r"other options: seed 0 \(now 1\)"):
        build(ShardOptions(**{**vars(options), "seed": 1}))
    (image_folder / "a.jpg").write_bytes(draw_image(99))
    written: list[int] = []
    with pytest.raises(OutputDirError, match="other files of the same source"):
        build(progress=Progress(tick=written.append))
    assert not written
    (image_folder / "a.jpg").unlink()
    for path in image_folder.glob("test/cat/[1-9].jpg"):
        path.unlink()
    for path in image_folder.glob("train/*/*"):
        path.unlink()
    with pytest.raises(OutputDirError, match="other files of the same source"):
        build(progress=Progress(tick=written.append))
    assert not written
    after = {path.name for path in (tmp_path / "out/.partial").iterdir()}
    assert before.keys() <= after
    with pytest.raises(KeyboardInterrupt):
        build(overwrite=True, progress=Progress(tick=stop))
    build(overwrite=True)
    assert read_manifest(tmp_path / "out").samples == 1


def test_parts_of_other_input_do_not_merge(
    image_folder: Path, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    def part(number: int) -> None:
        run = RunOptions(part=(number, 2))
        build_shards(image_folder, tmp_path / "out", WINDOWED, run=run)

    part(1)
    (image_folder / "train/owl/new.jpg").write_bytes(draw_image(99))
    with pytest.raises(OutputDirError, match="other files of the same source"):
        part(2)


def test_a_failed_run_leaves_nothing(image_tar: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="is empty"):
        build_shards(tmp_path / "empty", tmp_path / "new" / "out", PLAIN)
    image_tar.write_bytes(image_tar.read_bytes()[:9000])
    with pytest.raises(TarError):
        build_shards(image_tar, tmp_path / "new" / "out", ShardOptions(shuffle=False))
    assert not (tmp_path / "new").exists()


def test_classes_are_found_by_name_alone(mixed_folder: Path, tmp_path: Path) -> None:
    (mixed_folder / "notes").mkdir()
    (mixed_folder / "notes" / "readme.txt").write_text("no image")
    source = open_source(mixed_folder)
    assert find_classes(source, Selection()).names == ("cat", "dog", "owl", "train")
    assert find_classes(source, Selection(include=("train/owl/*",))).names == ("owl",)
    path = mixed_folder / "list.txt"
    path.write_text("gone/cat/1.jpg\t3\n../up.jpg\t9\ntrain/owl/0.png\t1\n")
    assert find_classes(open_source(path), Selection()).names == ("0", "1", "2", "3")


@pytest.mark.parametrize("in_memory", [2, 50_000])
def test_folders_are_listed_in_the_order_of_paths(
    in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_SORTED_IN_MEMORY", in_memory)
    names = ["a.jpg", "a/b.jpg", "a-b/c.jpg", "a/b/c.jpg", "a/b.c", "ü/1", "🙂/1", "z\n/2", "Z"]
    for name in [*names, os.fsdecode(b"\xff/1")]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    source = FolderSource(tmp_path, ordered=True)
    paths = [file.path for file in source.files()]
    assert paths == sorted(paths, key=path_key)
    assert len(paths) == 10
    assert sorted(paths) == sorted(file.path for file in source.unmeasured_files())


@given(
    st.lists(st.integers(1, 100)),
    st.none() | st.integers(1, 200),
    st.none() | st.integers(1, 9),
)
def test_streams_are_cut_into_full_shards(
    sizes: list[int], limit: int | None, most: int | None
) -> None:
    options = ShardOptions(bytes_per_shard=limit, samples_per_shard=most)
    files = [(str(number), size) for number, size in enumerate(sizes)]
    shards = list(cut_stream(files, options))
    assert [line for shard in shards for line in shard] == [line for line, _ in files]
    assert all(shards)
    lengths = [[sizes[int(line)] for line in shard] for shard in shards]
    if limit is None and most is None:
        assert len(shards) == min(8, len(sizes))
        assert max(map(len, shards), default=0) - min(map(len, shards), default=0) <= 1
        return
    for shard, after in itertools.pairwise(lengths):
        assert len(shard) == most or (limit is not None and sum(shard) + after[0] > limit)
    for shard in lengths:
        assert len(shard) == 1 or limit is None or sum(shard) <= limit
        assert len(shard) <= (most or len(shard))
