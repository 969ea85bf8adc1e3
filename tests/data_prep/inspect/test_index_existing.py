"""Existing tars become a set without being changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.format.index import read_index
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.tars import TarError
from data_prep.inspect.index_existing import index_existing
from data_prep.inspect.verify import verify_shards
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions

WriteTar = Callable[[Path, dict[str, bytes]], None]


@pytest.fixture
def foreign(tmp_path: Path, write_tar: WriteTar, draw_image: Callable[..., bytes]) -> Path:
    """Two tars with images, one of them with labels, and one without images."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    write_tar(folder / "b.tar", {"x.jpg": draw_image(0), "x.cls": b"2", "y.txt": b"text"})
    write_tar(folder / "a.tar", {"x.png": draw_image(1, image_format="PNG")})
    write_tar(folder / "c.tar", {"z.txt": b"text"})
    return folder


def test_foreign_tars_become_a_set(foreign: Path) -> None:
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    indexed = index_existing(foreign)
    manifest = read_manifest(foreign)
    assert indexed.manifest == manifest
    assert [shard.name for shard in manifest.shards] == ["a.tar", "b.tar"]
    assert manifest.classes == ("0", "1", "2")
    assert [read_index(foreign, shard).labels.tolist() for shard in manifest.shards] == [[-1], [2]]
    assert (indexed.without_image, indexed.empty) == (2, ("c.tar",))
    assert {name: (foreign / name).read_bytes() for name in before} == before
    assert {path.name for path in foreign.iterdir()} == {
        *before,
        "manifest.json",
        "a.index.npy",
        "b.index.npy",
    }
    assert verify_shards(manifest, decode=True).count == 0


def test_a_hostile_tar_leaves_nothing_behind(foreign: Path, write_tar: WriteTar) -> None:
    write_tar(foreign / "d.tar", {"../up.jpg": b"x"})
    before = sorted(foreign.iterdir())
    with pytest.raises(TarError, match="leads out"):
        index_existing(foreign)
    assert sorted(foreign.iterdir()) == before


def test_a_manifest_is_not_replaced_without_overwrite(foreign: Path) -> None:
    first = index_existing(foreign).manifest
    with pytest.raises(ManifestError, match="--overwrite"):
        index_existing(foreign)
    assert index_existing(foreign, overwrite=True).manifest == first
    (foreign / "manifest.json").write_text("damaged")
    assert index_existing(foreign, overwrite=True).manifest == first


def test_a_manifest_written_while_tars_are_read_is_kept(foreign: Path) -> None:
    def write_manifest(_samples: int) -> None:
        (foreign / "manifest.json").write_text("of another process")

    with pytest.raises(ManifestError, match="--overwrite"):
        index_existing(foreign, tick=write_manifest)
    assert (foreign / "manifest.json").read_text() == "of another process"
    assert not list(foreign.glob("*.npy"))


def test_our_own_sets_keep_their_class_names(image_zip: Path, tmp_path: Path) -> None:
    build_shards(image_zip, tmp_path / "out", ShardOptions())
    with pytest.raises(ManifestError, match="class names"):
        index_existing(tmp_path / "out", overwrite=True)


def test_tars_without_images_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    with pytest.raises(ManifestError, match="not a folder"):
        index_existing(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="no tars"):
        index_existing(tmp_path)
    write_tar(tmp_path / "a.tar", {"z.txt": b"text"})
    with pytest.raises(ManifestError, match="no images"):
        index_existing(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
