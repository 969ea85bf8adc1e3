"""Sets of shrunk pictures and of arrays: deterministic, readable by stock webdataset."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.format.index import read_index
from data_prep.images.checking import RE_ENCODED
from data_prep.images.settings import Encoding
from data_prep.inspect.index_existing import index_existing
from data_prep.inspect.verify import verify_shards
from data_prep.write.build import build_shards, merge_parts
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import OutputDirError

SMALL = ShardOptions(samples_per_shard=5, encoding=Encoding(short_side=16, format="jpeg"))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _read_stock(folder: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from webdataset import WebDataset

        urls = sorted(str(path) for path in folder.glob("*.tar"))
        return list(WebDataset(urls, shardshuffle=False))


def test_shrunk_sets_are_the_same_with_any_number_of_workers(
    image_zip: Path, tmp_path: Path
) -> None:
    one = build_shards(image_zip, tmp_path / "one", SMALL, run=RunOptions(workers=1))
    build_shards(image_zip, tmp_path / "two", SMALL, run=RunOptions(workers=2))
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert one.manifest.notes[RE_ENCODED] == 24
    for sample in _read_stock(tmp_path / "one"):
        about = json.loads(sample["json"])
        assert (about["height"], about["width"]) == (16, 19)
        assert RE_ENCODED in about["notes"]


def test_notes_of_all_parts_are_counted_and_resharding_re_encodes(
    image_zip: Path, tmp_path: Path
) -> None:
    build_shards(image_zip, tmp_path / "one", SMALL)
    for part in (1, 2):
        build_shards(image_zip, tmp_path / "parts", SMALL, run=RunOptions(part=(part, 2)))
    merged = merge_parts(tmp_path / "parts")
    assert _files(tmp_path / "one") == _files(tmp_path / "parts")
    assert merged.notes[RE_ENCODED] == 24
    smaller = ShardOptions(encoding=Encoding(max_side=8, format="webp"))
    built = build_shards(tmp_path / "parts", tmp_path / "small", smaller, shards=True)
    assert built.manifest is not None
    assert built.manifest.notes[RE_ENCODED] == 24
    samples = _read_stock(tmp_path / "small")
    assert len(samples) == 24
    for sample in samples:
        about = json.loads(sample["json"])
        assert max(about["height"], about["width"]) == 8
        assert "webp" in sample


def test_a_set_with_another_encoding_is_refused(image_zip: Path, tmp_path: Path) -> None:
    build_shards(image_zip, tmp_path / "out", SMALL)
    with pytest.raises(OutputDirError, match=r"short_side 16 \(now None\)"):
        build_shards(image_zip, tmp_path / "out", ShardOptions(samples_per_shard=5))


def test_arrays_are_samples_like_any_other(tmp_path: Path) -> None:
    values = {
        f"{name}/{number}": np.random.default_rng(number).normal(size=(8, 9, 6)).astype("f4")
        for name in ("field", "wood")
        for number in range(4)
    }
    for name, array in values.items():
        path = tmp_path / "images" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    np.save(tmp_path / "images" / "flat.npy", np.zeros(9))
    built = build_shards(tmp_path / "images", tmp_path / "out", ShardOptions())
    assert (built.found, built.manifest.samples, built.manifest.rejected) == (9, 8, 1)
    assert built.manifest.classes == ("field", "wood")
    assert verify_shards(built.manifest, decode=True).count == 0
    for sample in _read_stock(tmp_path / "out"):
        stored = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        name = json.loads(sample["json"])["path"].removesuffix(".npy")
        assert np.array_equal(stored, values.pop(name))
    assert not values


def test_an_array_next_to_a_picture_is_not_the_image(
    tmp_path: Path,
    write_tar: Callable[[Path, dict[str, bytes]], None],
    draw_image: Callable[..., bytes],
) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 5), dtype=np.uint8))
    array = buffer.getvalue()
    members = {"a.jpg": draw_image(0), "a.npy": array, "b.npy": array, "c.depth.npy": array}
    write_tar(tmp_path / "theirs.tar", members)
    indexed = index_existing(tmp_path)
    index = read_index(tmp_path, indexed.manifest.shards[0])
    assert index.extensions.tolist() == ["jpg", "npy"]
    assert indexed.without_image == 1
    assert verify_shards(indexed.manifest, decode=True).count == 0
