"""Files that vanish while they are listed, or before they are read, are counted and not the end."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from data_prep.sources import folders
from data_prep.sources.image_source import open_source
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions
from data_prep.write.progress import Progress


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_vanishes_while_it_is_listed_is_counted(
    image_folder: Path, ordered: bool, replaced: bool
) -> None:
    with closing(open_source(image_folder, ordered=ordered)) as source:
        files = source.files()
        first = next(files)
        kept, gone = ("test", "train") if first.path.startswith("test") else ("train", "test")
        shutil.rmtree(image_folder / gone)
        if replaced:  # by a file, after the folder was seen
            (image_folder / gone).touch()
        found = {first.path, *(file.path for file in files)}
        counted = dict(source.skipped)
    assert found == {
        str(path.relative_to(image_folder)) for path in (image_folder / kept).rglob("*.*")
    }
    assert counted == {folders.VANISHED: 1}


def test_the_set_keeps_the_count(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, asked = os.stat, list[str]()

    def stat_and_remove(path: object, *arguments: object, **names: object) -> os.stat_result:
        text = os.fspath(path) if not isinstance(path, int) else ""
        if text.endswith("train/cat/0.jpg") and not asked:
            asked.append(text)
            Path(text).unlink()
        return stat(path, *arguments, **names)

    monkeypatch.setattr(os, "stat", stat_and_remove)
    command = ["shard", str(image_folder), str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.samples, manifest.rejected) == (23, 0)
    assert manifest.skipped == {folders.VANISHED: 1}
    assert main(command) == 0  # the same files as before: complete


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_what_vanishes_before_it_is_read_is_rejected(
    kind: str, image_folder: Path, tmp_path: Path
) -> None:
    source = image_folder
    if kind == "list":
        source = tmp_path / "list.txt"
        source.write_text("\n".join(map(str, sorted(image_folder.rglob("*.jpg")))))
    built = build_shards(
        source,
        tmp_path / "out",
        ShardOptions(),
        progress=Progress(planned=lambda _: (image_folder / "train/cat/0.jpg").unlink()),
    )
    assert built.manifest is not None
    assert built.manifest.rejected == 1
    assert built.found == built.manifest.samples + 1
    row = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert row["path"].endswith("train/cat/0.jpg")
    assert "No such file" in row["reason"]


def test_a_folder_that_may_not_be_read_is_still_the_end(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that are there and cannot be listed would otherwise be lost silently."""
    scan: Callable[..., object] = os.scandir

    def refuse(path: object) -> object:
        if str(path).rstrip("/").endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["shard", str(image_folder), str(image_folder.parent / "out")]) == 2
    printed = capsys.readouterr().err
    assert "cat" in printed
    assert "Permission denied" in printed


@pytest.mark.parametrize("order", [["--no-shuffle"], ["--shuffle-window", "8"], []])
def test_what_vanishes_in_the_pass_for_the_classes_is_counted(
    order: list[str], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = folders.FolderSource._walk
    gone = sorted((image_folder / "train/dog").iterdir())[:5]

    def walk_and_remove(source: folders.FolderSource, *, ordered: bool) -> Iterator[str]:
        found = list(walk(source, ordered=ordered))
        for path in gone:
            path.unlink(missing_ok=True)
        yield from found

    monkeypatch.setattr(folders.FolderSource, "_walk", walk_and_remove)
    command = ["shard", str(image_folder), str(tmp_path / "out"), "--workers", "1", *order]
    assert main(command) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.samples, manifest.skipped) == (19, {folders.VANISHED: 5})
