"""Options of `data-prep shard` for arrays and large pictures, by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from simmim.data.datasets.shards import ShardSet
from simmim.data.transforms.decoding import decode_pixels


def _shard(source: Path, folder: Path, *options: str) -> int:
    return main(["shard", str(source), str(folder), "--workers", "1", "--no-shuffle", *options])


def _pixels(folder: Path, channels: int) -> list[np.ndarray]:
    shards = ShardSet(folder)
    raws = [
        shards.read(shard, row) for shard, size in enumerate(shards.sizes) for row in range(size)
    ]
    return [decode_pixels(raw.image, raw.extension, channels=channels).pixels for raw in raws]


@pytest.fixture
def arrays(tmp_path: Path) -> list[np.ndarray]:
    """Two arrays of 5 channels x 20 rows x 24 columns, in `tmp_path / "in"`."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 2**16, (5, 20, 24), dtype=np.uint16) for _ in range(2)]
    for number, values in enumerate(made):
        np.save(tmp_path / "in" / f"{number}.npy", values)
    return made


@pytest.mark.parametrize("options", [(), ("--channels-first",)])
def test_channels_in_front_are_stored_last(
    options: tuple[str, ...],
    arrays: list[np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _shard(tmp_path / "in", tmp_path / "out", *options) == 0
    assert "channels moved to the last axis: 2" in capsys.readouterr().out
    found = _pixels(tmp_path / "out", 5)
    assert all(map(np.array_equal, found, (values.transpose(1, 2, 0) for values in arrays)))
    assert main(["verify", str(tmp_path / "out"), "--deep", "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.options.get("channel_axis") == ("first" if options else None)


def test_channels_last_takes_arrays_as_they_are(arrays: list[np.ndarray], tmp_path: Path) -> None:
    assert _shard(tmp_path / "in", tmp_path / "out", "--channels-last") == 0
    assert all(map(np.array_equal, _pixels(tmp_path / "out", 24), arrays))
    assert not read_manifest(tmp_path / "out").notes


@pytest.mark.usefixtures("arrays")
def test_both_axes_at_once_are_refused(tmp_path: Path) -> None:
    assert _shard(tmp_path / "in", tmp_path / "out", "--channels-first", "--channels-last") == 2


def test_max_pixels_above_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg", "c.tif"):
        Image.new("RGB", (30, 20), "red").save(tmp_path / "in" / name)
    assert _shard(tmp_path / "in", tmp_path / "out", "--max-pixels", "600") == 0
    assert len(_pixels(tmp_path / "out", 3)) == 3
    assert main(["verify", str(tmp_path / "out"), "--deep", "--workers", "1"]) == 0
    assert main(["info", str(tmp_path / "out"), "--statistics", "--workers", "1"]) == 0
    assert _shard(tmp_path / "in", tmp_path / "other", "--max-pixels", "599") == 2


@pytest.mark.slow
def test_a_picture_beyond_pillows_default_limit(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("1", (14_000, 13_000), 1).save(tmp_path / "in" / "large.png")
    assert _shard(tmp_path / "in", tmp_path / "refused") == 2
    assert _shard(tmp_path / "in", tmp_path / "out", "--max-pixels", "200000000") == 0
    assert main(["verify", str(tmp_path / "out"), "--deep", "--workers", "1"]) == 0
    raw = ShardSet(tmp_path / "out").read(0, 0)
    found = decode_pixels(raw.image, raw.extension, channels=1, max_pixels=200_000_000)
    assert found.pixels.shape == (13_000, 14_000, 1)


def test_rejections_name_what_a_tiff_is(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "in" / "a.png")
    wrong = np.zeros((20, 30), dtype=np.complex64)
    tifffile.imwrite(tmp_path / "in" / "b.tif", wrong)
    assert _shard(tmp_path / "in", tmp_path / "out", "--max-rejected", "0.5") == 0
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert rejected["path"] == "b.tif"
    assert "TIFF" in rejected["reason"]
    assert "complex64" in rejected["reason"]
    assert ".npy" in rejected["reason"]
