"""Classes of folders: the same for training on a folder and on shards made of it."""

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions
from simmim.data.datasets.folder import open_folder
from simmim.data.datasets.mixture import Shards
from simmim.data.datasets.opening import open_sets


def labelled(images: Shards) -> Counter[tuple[bytes, int | None]]:
    """Count image and label of every sample."""
    read = (images.read(part, row) for part, size in enumerate(images.sizes) for row in range(size))
    return Counter((sample.image, sample.label) for sample in read)


TREES = {
    "plain": ["cat/1.png", "dog/1.png"],
    "deep": ["sub dir/deep/1.png", "sub dir/other/2.png", "3.png", "x/y/.hidden/4.png"],
    "splits": ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png"],
    "bytes": ["\udce9/1.png", "~/2.png", "é/3.png"],
}


@pytest.mark.parametrize("tree", TREES)
def test_labels_are_those_of_shards_made_of_the_folder(tree: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number, name in enumerate(TREES[tree]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 8)).save(source / name)
    (source / "linked").symlink_to(tmp_path / "away")
    (tmp_path / "away").mkdir()
    Image.new("RGB", (7, 8)).save(tmp_path / "away" / "1.png")
    build_shards(source, tmp_path / "shards", ShardOptions())
    images, shards = open_folder(source), open_sets(str(tmp_path / "shards"))
    assert labelled(images) == labelled(shards)
    assert len(images.classes) == len(shards.classes)


@pytest.mark.parametrize(
    ("names", "doubt"),
    [
        (
            ["cat/left/1.png", "dog/left/2.png", "dog/up/3.png"],
            "'left' is 2 folders (cat/left, dog",
        ),
        (["cat/1.png", "cat/old/2.png"], "'old' is in the folder of another class (cat/old)"),
    ],
)
def test_classes_that_are_not_clear_are_refused(
    names: list[str], doubt: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    images = open_folder(tmp_path)
    with pytest.raises(ValueError, match=re.escape(doubt)):
        images.require_labels()


@pytest.mark.parametrize("option", ["--seed", "--shuffle-window"])
def test_sharding_names_classes_that_are_not_clear(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("train/cat/1.png", "test/cat/2.png", "train/dog/3.png", "val/4.png")
    for number, name in enumerate(names):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8 + number)).save(path)
    command = ["shard", str(tmp_path / "source"), str(tmp_path / "shards"), option, "5"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert (
        "folder that holds it: 'cat' is 2 folders (test/cat, train/cat); 'val' is called like a"
        in said
    )
    assert "dog" not in said
