"""Manifests and indexes round-trip, and damage is reported."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.format.index import ShardIndex, read_index, write_index
from data_prep.format.manifest import (
    IMAGE_EXTENSIONS,
    Manifest,
    ManifestError,
    ShardEntry,
    read_manifest,
    write_manifest,
)

LENGTH = 10_240


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one shard of two samples; the tar itself is only as long as promised."""
    (tmp_path / "a.tar").write_bytes(bytes(LENGTH))
    write_index(tmp_path / "a.index.npy", _index([("x", 512, 9, 0), ("y", 2048, 70, -1)]))
    write_manifest(Manifest(folder=tmp_path, shards=(_entry(),), classes=("cat", "dog")))
    return tmp_path


def _entry() -> ShardEntry:
    return ShardEntry(name="a.tar", samples=2, bytes=LENGTH, sha256="0" * 64, index="a.index.npy")


def _index(rows: list[tuple[str, int, int, int]]) -> ShardIndex:
    keys, offsets, sizes, labels = zip(*rows, strict=True)
    return ShardIndex(
        offsets=np.array(offsets),
        sizes=np.array(sizes),
        labels=np.array(labels),
        keys=np.array(keys),
        extensions=np.array(["jpg"] * len(rows)),
    )


def test_a_manifest_is_read_back_as_written(folder: Path) -> None:
    manifest = Manifest(
        folder=folder,
        shards=(_entry(),),
        classes=("katze", "mår"),
        rejected=3,
        options={"seed": 7, "include": ["*.jpg"]},
        fingerprint="ab",
    )
    write_manifest(manifest)
    assert read_manifest(folder) == manifest
    assert read_manifest(str(folder)).samples == 2


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.text(
                st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1
            ),
            st.integers(0, 5_000),
            st.integers(1, 5_000),
            st.integers(-1, 10**6),
        ),
        min_size=2,
        max_size=2,
    )
)
def test_an_index_is_read_back_as_written(
    rows: list[tuple[str, int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / "a.tar").write_bytes(bytes(LENGTH))
    written = _index(rows)
    write_index(folder / "a.index.npy", written)
    index = read_index(folder, _entry())
    assert len(index) == 2
    for name in vars(written):
        assert np.array_equal(getattr(index, name), getattr(written, name)), name
    assert index.offsets.dtype == index.sizes.dtype == index.labels.dtype == np.int64
    assert set(index.extensions) <= set(IMAGE_EXTENSIONS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "other"}, "not a manifest"),
        ({"version": 2}, "version 2"),
        ({"samples": 3}, "samples.* 3"),
        ({"samples": "2"}, "samples"),
        ({"samples": True}, "samples"),
        ({"classes": [1]}, r"classes\[0\] is 1, and must be text"),
        ({"classes": ["a", "a"]}, "classes"),
        ({"classes": None}, "classes is null, and must be a list"),
        ({"shards": []}, "no shards"),
        ({"shards": [3]}, r"shards\[0\] is 3, and must be an object"),
        ({"shards": None}, "shards is null, and must be a list"),
        ({"shards": [{}] * 9}, r"shards\[0\].name is missing; .*; and 40 more mistakes\. Make"),
        ({"rejected": -1}, "rejected is -1, and must be 0 or more"),
        ({"notes": {"NaN values": 0}}, "notes.NaN values is 0, and must be 1 or more"),
        ({"skipped_examples": {"text": "a"}}, "skipped_examples.text"),
        ({"options": []}, r"options is \[\], and must be an object"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, change: dict[str, Any], named: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ManifestError, match=named) as error:
        read_manifest(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../a.tar"),
        ("name", "/etc/a.tar"),
        ("name", "a.tar\n"),
        ("name", ".."),
        ("index", "b/a.npy"),
        ("index", "a.pickle"),
        ("sha256", "0" * 63),
        ("samples", 0),
        ("bytes", -1),
        ("bytes", 1.5),
        ("bytes", "10240"),
        ("bytes", True),
    ],
)
def test_an_impossible_shard_is_named(folder: Path, field: str, value: object) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][0][field] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=rf"shards\[0\]\.{field} is .*, and must be .*\. Make"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["classes", "rejected", "options", "fingerprint", "shards"])
def test_a_missing_field_is_named(folder: Path, name: str) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=f"{name} is "):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000, '{"format": NaN}'])
def test_invalid_manifests_are_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(folder)


def test_missing_manifests_have_distinct_messages(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="data-prep index"):
        read_manifest(folder)
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(folder / "nowhere")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ManifestError, match=f"data-prep shard SRC {empty}"):
        read_manifest(empty)
    (empty / "cat").mkdir()
    with pytest.raises(ManifestError, match=f"classes of images.*data-prep shard {empty} DST"):
        read_manifest(empty)
    with pytest.raises(ManifestError, match=r"a\.tar"):
        read_manifest(folder / "a.tar")


@pytest.mark.parametrize(
    "row",
    [
        ("x", -1, 5, 0),
        ("x", 0, 0, 0),
        ("x", 0, LENGTH + 1, 0),
        ("x", LENGTH, 1, 0),
        ("x", 2**63 - 1, 2**63 - 1, 0),
        ("x", 0, 5, -2),
    ],
)
def test_samples_outside_of_the_shard_are_refused(
    folder: Path, row: tuple[str, int, int, int]
) -> None:
    write_index(folder / "a.index.npy", _index([("fine", 0, 5, 0), row]))
    with pytest.raises(ManifestError, match="sample 1"):
        read_index(folder, _entry())


def test_invalid_indexes_are_refused(folder: Path) -> None:
    path = folder / "a.index.npy"
    rows = path.read_bytes()
    hostile = [
        b"",
        rows[:-1],
        rows[:20],
        b"PK\x03\x04" + bytes(60),
        pickle.dumps([1, 2]),
        rows.replace(b"(2,)", b"(1,)"),
        rows.replace(b"(2,), }     ", b"(9999999,), }"[:12]),
    ]
    for data in hostile:
        path.write_bytes(data)
        with pytest.raises(ManifestError, match=r"a\.index\.npy"):
            read_index(folder, _entry())
    np.save(path, np.zeros(2))
    with pytest.raises(ManifestError, match="not an index"):
        read_index(folder, _entry())
    path.unlink()
    with pytest.raises(ManifestError, match="missing"):
        read_index(folder, _entry())


def test_a_shard_that_was_cut_is_refused(folder: Path) -> None:
    (folder / "a.tar").write_bytes(bytes(LENGTH - 512))
    with pytest.raises(ManifestError, match=r"a\.tar has 9,728 bytes"):
        read_index(folder, _entry())
    (folder / "a.tar").unlink()
    with pytest.raises(ManifestError, match=r"a\.tar cannot be read"):
        read_index(folder, _entry())
