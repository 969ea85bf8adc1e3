"""Options of sets: validation, duplicates, rejection limit, parts and Ray."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.format.index import read_index
from data_prep.format.manifest import Manifest, read_manifest
from data_prep.sources.files import SourceError
from data_prep.write.build import BuildResult, build_shards, merge_parts
from data_prep.write.finalize import TooManyRejectedError
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import OutputDirError
from data_prep.write.plan import is_held_out

OPTIONS = ShardOptions(samples_per_shard=5)


def _hash_files(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _paths(manifest: Manifest, shard: int) -> list[str]:
    entry = manifest.shards[shard]
    data = (manifest.folder / entry.name).read_bytes()
    starts = [data.index(f"{key}.json".encode()) for key in read_index(manifest.folder, entry).keys]
    texts = [data[start + 512 :].split(b"\0")[0] for start in starts]
    return [json.loads(text)["path"] for text in texts]


def _part(source: Path, folder: Path, part: tuple[int, int], **rest: Any) -> BuildResult:
    return build_shards(source, folder, OPTIONS, run=RunOptions(part=part), **rest)


def test_validation_samples_are_in_the_last_shards(image_zip: Path, tmp_path: Path) -> None:
    options = ShardOptions(samples_per_shard=3, validation_fraction=0.3)
    manifest = build_shards(image_zip, tmp_path / "out", options).manifest
    assert manifest is not None
    held_out = manifest.options["validation_shards"]
    paths = [_paths(manifest, shard) for shard in range(len(manifest.shards))]
    first = len(paths) - held_out
    assert 0 < held_out < len(paths)
    assert all(is_held_out(path, options) for shard in paths[first:] for path in shard)
    assert not any(is_held_out(path, options) for shard in paths[:first] for path in shard)
    assert build_shards(image_zip, tmp_path / "out", options).was_complete
    with pytest.raises(OutputDirError, match=r"validation_fraction 0\.3 \(now 0\.4\)"):
        build_shards(
            image_zip, tmp_path / "out", ShardOptions(samples_per_shard=3, validation_fraction=0.4)
        )


def test_of_duplicates_the_smallest_path_is_kept(image_folder: Path, tmp_path: Path) -> None:
    data = (image_folder / "train/cat/0.jpg").read_bytes()
    (image_folder / "train/owl/copy.jpg").write_bytes(data)
    (image_folder / "a.jpg").write_bytes(data)
    for name, workers in (("one", 1), ("two", 2)):
        built = build_shards(
            image_folder,
            tmp_path / name,
            ShardOptions(samples_per_shard=5, deduplicate=True),
            run=RunOptions(workers=workers, max_rejected=0),
        )
        assert built.manifest is not None
        assert (built.found, built.manifest.samples, built.manifest.rejected) == (26, 24, 2)
    lines = (tmp_path / "one" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"path": "train/cat/0.jpg", "reason": "a duplicate of a.jpg"},
        {"path": "train/owl/copy.jpg", "reason": "a duplicate of a.jpg"},
    ]
    assert _hash_files(tmp_path / "one") == _hash_files(tmp_path / "two")


def test_too_many_rejected_keep_the_work_and_are_all_listed(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*(f"cat/{number}.jpg" for number in range(6)), "dog/0.JPEG"]:
        (image_folder / "train" / name).write_bytes(b"some text")
    arguments = ["shard", str(image_folder), str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(TooManyRejectedError, match=r"(?s)7 of 24 .*train/cat/0\.jpg"):
        build_shards(image_folder, tmp_path / "api", OPTIONS, run=RunOptions(max_rejected=0.08))
    assert main(arguments) == 2
    listed = tmp_path / "out" / ".partial" / "rejected.jsonl"
    assert str(listed) in capsys.readouterr().err
    paths = [json.loads(line)["path"] for line in listed.read_text().splitlines()]
    assert paths == [f"train/cat/{number}.jpg" for number in range(6)] + ["train/dog/0.JPEG"]
    finished = {path.stat().st_ino for path in (tmp_path / "out" / ".partial").glob("*.tar")}
    assert main([*arguments, "--max-rejected", "0.3"]) == 0
    assert finished == {path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert all(json.loads(line)["key"].isdecimal() for line in lines)


def test_shards_by_bytes(image_zip: Path, tmp_path: Path) -> None:
    manifest = build_shards(
        image_zip, tmp_path / "out", ShardOptions(bytes_per_shard=4000)
    ).manifest
    assert manifest is not None
    for shard in manifest.shards:
        assert read_index(manifest.folder, shard).sizes.sum() <= 4000
    assert manifest.samples == 24


def test_windows_shuffle_among_neighbours(image_folder: Path, tmp_path: Path) -> None:
    options = ShardOptions(samples_per_shard=6, shuffle_window=6)
    manifest = build_shards(image_folder, tmp_path / "out", options).manifest
    assert manifest is not None
    folders = ["test/cat", "train/cat", "train/dog", "train/owl"]
    for shard, folder in enumerate(folders):
        paths = _paths(manifest, shard)
        assert {str(Path(path).parent) for path in paths} == {folder}
    assert _paths(manifest, 0) != sorted(_paths(manifest, 0))


def test_parts_merge_into_the_same_bytes(image_zip: Path, tmp_path: Path) -> None:
    build_shards(image_zip, tmp_path / "whole", OPTIONS)
    folder = tmp_path / "parts"
    with pytest.raises(OutputDirError, match="no parts to merge"):
        merge_parts(folder)
    assert _part(image_zip, folder, (2, 3)).manifest is None
    _part(image_zip, folder, (1, 3))
    with pytest.raises(OutputDirError, match=r"lacks 1 of 5 shards \(2\)"):
        merge_parts(folder)
    with pytest.raises(OutputDirError, match="--overwrite would"):
        _part(image_zip, folder, (3, 3), overwrite=True)
    arguments = ["--samples-per-shard", "5", "--part", "3/3", "--workers", "1"]
    assert main(["shard", str(image_zip), str(folder), *arguments]) == 0
    assert main(["merge", str(folder)]) == 0
    assert _hash_files(folder) == _hash_files(tmp_path / "whole")
    assert _part(image_zip, folder, (1, 3)).was_complete


def test_a_part_of_other_input_is_refused(
    image_folder: Path, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    _part(image_folder, tmp_path / "out", (1, 2))
    (image_folder / "new.jpg").write_bytes(draw_image(99))
    with pytest.raises(OutputDirError, match="other files of the same source"):
        _part(image_folder, tmp_path / "out", (2, 2))


def test_invalid_run_options_are_reported() -> None:
    with pytest.raises(ValueError, match="--part must"):
        RunOptions(part=(3, 2))
    with pytest.raises(ValueError, match="--max-rejected is 2; it must"):
        RunOptions(max_rejected=2)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_missing_ray_is_named(image_zip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'simmim\[ray\]'"):
        build_shards(image_zip, tmp_path / "out", OPTIONS, run=RunOptions(executor="ray"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("options", [OPTIONS, ShardOptions(samples_per_shard=5, shuffle_window=7)])
def test_ray_writes_the_same_bytes(
    options: ShardOptions, image_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    (image_folder / "train/cat/0.jpg").write_bytes(b"some text")
    build_shards(image_folder, tmp_path / "whole", options)
    run = RunOptions(executor="ray", workers=2)
    build_shards(image_folder, tmp_path / "ray", options, run=run)
    assert _hash_files(tmp_path / "ray") == _hash_files(tmp_path / "whole")
    assert read_manifest(tmp_path / "ray").rejected == 1
    one = image_folder / "list.txt"
    one.write_text("train/cat/0.jpg\n")
    with pytest.raises(SourceError, match="only image cannot be used"):
        build_shards(one, tmp_path / "bad", options, run=run)
