"""Labelled shards in the order of their classes: nothing to learn, or little to measure."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep.cli
from simmim.data.datasets.mixture import Shards
from simmim.data.datasets.opening import open_set
from simmim.data.datasets.remote import RemoteReading
from simmim.tasks.loading import open_labelled


def foreign_shards(folder: Path, *classes: list[int]) -> Shards:
    """Write and index shards of someone else, with an image of each class listed."""
    folder.mkdir()
    for number, shard in enumerate(classes):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for key, label in enumerate(shard):
                file = io.BytesIO()
                pixels = np.full((4, 4, 3), 10 * number + key, dtype=np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                for name, data in (
                    (f"{number}-{key}.cls", str(label).encode()),
                    (f"{number}-{key}.png", file.getvalue()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    assert data_prep.cli.main(["index", str(folder)]) == 0
    return open_set(folder, RemoteReading())


def test_training_on_a_single_class_is_refused(tmp_path: Path) -> None:
    shards = foreign_shards(tmp_path / "sorted", [0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match=r"all 3 images to learn from in .* are of the class '0'"):
        open_labelled(shards, validation=None, validation_shards=1, fraction=1.0, seed=0)


def test_validation_on_a_single_class_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for name, last in (("one", [1, 1, 1]), ("both", [1, 0, 1])):
        shards = foreign_shards(tmp_path / name, [0, 1, 0], last)
        capsys.readouterr()
        open_labelled(shards, validation=None, validation_shards=1, fraction=1.0, seed=0)
        said.append(capsys.readouterr().err)
    assert "WARNING: all 3 held-out images of" in said[0]
    assert "are of the class '1'" in said[0]
    assert not said[1]
