"""Verification passes what was written and names every kind of damage."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.format.index import checksum, read_index, write_index
from data_prep.format.manifest import Manifest, read_manifest
from data_prep.inspect.index_existing import index_existing
from data_prep.inspect.verify import MAX_PROBLEMS, verify_shards
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.decoding import decode_pixels


@pytest.fixture
def shards(image_zip: Path, tmp_path: Path) -> Manifest:
    """Four shards of six images."""
    built = build_shards(image_zip, tmp_path / "out", ShardOptions(samples_per_shard=6))
    return built.manifest


def _problem(shards: Manifest, *, decode: bool = True) -> str:
    found = verify_shards(read_manifest(shards.folder), decode=decode)
    (problem,) = found.problems
    assert found.count == 1
    return problem


def test_a_whole_set_has_no_problems(shards: Manifest) -> None:
    ticks: list[int] = []
    for decode in (True, False):
        ticks.clear()
        found = verify_shards(shards, decode=decode, tick=ticks.append)
        assert (found.problems, found.count) == ((), 0)
        assert sum(ticks) == shards.samples


def test_a_flipped_bit_is_found(shards: Manifest) -> None:
    path = shards.folder / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    index = read_index(shards.folder, shards.shards[2])
    data[int(index.offsets[3]) + 40] ^= 1
    path.write_bytes(data)
    assert _problem(shards, decode=False).startswith("shard-000002.tar: its SHA-256 is")


def test_lost_cut_and_stray_tars_are_found(shards: Manifest) -> None:
    path = shards.folder / "shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    assert "truncated or changed" in _problem(shards)
    path.unlink()
    assert "cannot be read" in _problem(shards)
    path.write_bytes(whole)
    (shards.folder / "more.tar").write_bytes(whole)
    assert _problem(shards) == "more.tar: not in the manifest"


def test_an_index_that_does_not_fit_is_found(shards: Manifest) -> None:
    index = read_index(shards.folder, shards.shards[0])
    index.offsets[[0, 1]] = index.offsets[[1, 0]]
    write_index(shards.folder / shards.shards[0].index, index)
    assert "does not match" in _problem(shards, decode=False)


def test_a_bad_image_and_a_bad_label_are_found(shards: Manifest) -> None:
    path = shards.folder / "shard-000000.tar"
    index = read_index(shards.folder, shards.shards[0])
    data = bytearray(path.read_bytes())
    start = int(index.offsets[2])
    data[start : start + 4] = b"none"
    path.write_bytes(data)
    text = (shards.folder / "manifest.json").read_text()
    text = text.replace(shards.shards[0].sha256, checksum(path))
    (shards.folder / "manifest.json").write_text(text)
    assert f"image {index.keys[2]}" in _problem(shards)
    assert verify_shards(read_manifest(shards.folder), decode=False).count == 0
    values = json.loads(text) | {"classes": ["cat", "dog"]}
    (shards.folder / "manifest.json").write_text(json.dumps(values))
    problems = verify_shards(read_manifest(shards.folder), decode=False).problems
    assert problems
    assert all("labels beyond the number of classes, 2" in problem for problem in problems)


def test_a_damaged_shard_is_decoded_all_the_same_so_that_the_image_is_named(
    shards: Manifest,
) -> None:
    path = shards.folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    index = read_index(shards.folder, shards.shards[1])
    start = int(index.offsets[4])
    data[start : start + 4] = b"none"
    path.write_bytes(data)
    found = verify_shards(shards, decode=True)
    assert found.count == 2
    assert f"image {index.keys[4]}" in " ".join(found.problems)
    assert "SHA-256" in " ".join(found.problems)


def test_problems_beyond_the_first_are_counted(shards: Manifest) -> None:
    for shard in shards.shards:
        path = shards.folder / shard.name
        data = bytearray(path.read_bytes())
        for offset in read_index(shards.folder, shard).offsets:
            data[int(offset) : int(offset) + 4] = b"none"
        path.write_bytes(data)
    for number in range(200):
        (shards.folder / f"stray-{number:03d}.tar").write_bytes(b"")
    one = verify_shards(shards, decode=True)
    two = verify_shards(shards, decode=True, workers=2)
    assert one == two
    assert one.count == 200 + shards.samples + len(shards.shards)
    assert len(one.problems) == MAX_PROBLEMS


def test_sets_that_others_wrote_are_verified_too(
    tmp_path: Path,
    write_tar: Callable[[Path, dict[str, bytes]], None],
    draw_image: Callable[..., bytes],
) -> None:
    members = {f"{number:03d}.png": draw_image(number, image_format="PNG") for number in range(5)}
    members["003.png"] = members["003.png"][:-30]
    write_tar(tmp_path / "theirs.tar", members)
    manifest = index_existing(tmp_path).manifest
    assert verify_shards(manifest, decode=False).count == 0
    assert "image 003: it is truncated" in _problem(manifest)


def test_another_format_than_the_extension_says_is_noted(
    tmp_path: Path,
    write_tar: Callable[[Path, dict[str, bytes]], None],
    draw_image: Callable[..., bytes],
) -> None:
    write_tar(tmp_path / "theirs.tar", {"a.jpg": draw_image(0, image_format="BMP")})
    manifest = index_existing(tmp_path).manifest
    found = verify_shards(read_manifest(manifest.folder), decode=True)
    assert found.count == 0
    assert found.notes["of another format than the extension says"] == 1


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))


def test_every_image_is_judged_as_training_reads_it(
    tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((12, 60, 70), dtype=np.uint8))
    array, jpeg = buffer.getvalue(), draw_image(0)
    good = {
        "a.jpg": draw_image(1, image_format="GIF"),
        "b.png": draw_image(2, image_format="TIFF"),
        "c.npy": array,
    }
    for members, count in ((good, 0), ({"d.jpg": array, "e.npy": jpeg, "f.jpg": jpeg}, 2)):
        folder = tmp_path / str(count)
        folder.mkdir()
        _tar(folder / "x.tar", members)
        index_existing(folder)
        found = verify_shards(read_manifest(folder), decode=True)
        assert found.count == count, found.problems
        for name, data in members.items():
            extension = name.partition(".")[2]
            channels = 70 if extension == "npy" else 3
            try:
                decode_pixels(data, extension, channels=channels)
                is_read = True
            except BadSampleError:
                is_read = False
            assert is_read == (not any(f"image {name[0]}:" in line for line in found.problems))
        if count == 0:
            assert found.notes["of another format than the extension says"] == 2
            assert any("first axis" in note for note in found.notes)
