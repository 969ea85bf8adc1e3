"""Duplicates: each file is read once, also across stopped runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.sources.files import SourceFile
from data_prep.sources.folders import FolderSource
from data_prep.write import duplicates
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions

OPTIONS = ShardOptions(deduplicate=True, samples_per_shard=8, check=False)


@pytest.fixture
def many_images(tmp_path: Path, draw_image: Callable[..., bytes]) -> Path:
    """60 images, no two alike."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        data = draw_image(number, size=8, image_format="PNG")
        (folder / f"{number}.png").write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def test_a_resumed_run_reuses_digests(
    many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (many_images / "7.png").write_bytes((many_images / "6.png").read_bytes())
    total = len(list(many_images.iterdir()))
    build_shards(many_images, tmp_path / "whole", OPTIONS)

    monkeypatch.setattr(duplicates, "_FILES_PER_TASK", 10)
    read, taken = FolderSource.read, []

    def counted(source: FolderSource, file: SourceFile) -> bytes:
        taken.append(file.path)
        if len(taken) == stop:
            raise KeyboardInterrupt
        return read(source, file)

    monkeypatch.setattr(FolderSource, "read", counted)
    stop = 26
    with pytest.raises(KeyboardInterrupt):
        build_shards(many_images, tmp_path / "out", OPTIONS)
    taken.clear()
    stop = -1
    built = build_shards(many_images, tmp_path / "out", OPTIONS)
    assert built.manifest is not None
    assert len(taken) == (total - 20) + built.manifest.samples
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_changed_files_are_read_again(
    many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.write.duplicates._mark_duplicates", fail)
        with pytest.raises(KeyboardInterrupt):
            build_shards(many_images, tmp_path / "out", OPTIONS)
    assert list((tmp_path / "out" / ".partial").glob("digests-*"))
    (many_images / "9.png").write_bytes((many_images / "8.png").read_bytes())
    built = build_shards(many_images, tmp_path / "out", OPTIONS)
    fresh = build_shards(many_images, tmp_path / "fresh", OPTIONS)
    assert built.manifest is not None
    assert fresh.manifest is not None
    assert built.manifest.shards == fresh.manifest.shards
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
