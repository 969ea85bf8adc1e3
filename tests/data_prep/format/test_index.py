"""Indexes of tars agree with stock webdataset, and hostile tars are refused."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.format.index import index_tar
from data_prep.format.labels import MAX_CLASSES
from data_prep.format.tars import TarError

WriteTar = Callable[[Path, dict[str, bytes]], None]


def test_the_index_of_a_foreign_tar(tmp_path: Path, write_tar: WriteTar) -> None:
    members = {
        "__meta__": b"{}",
        "a/b.c/x1.JPG": b"first",
        "a/b.c/x1.cls": b" 7\n",
        "a/b.c/x1.seg.png": b"a mask, not the image",
        "x2.txt": b"no image",
        "x3.png": b"third",
        "README": b"no extension",
        ".hidden.jpg": b"no key",
    }
    path = tmp_path / "a.tar"
    write_tar(path, members)
    indexed = index_tar(path, lambda _: None)
    index, data = indexed.index, path.read_bytes()
    images = [
        data[offset : offset + size]
        for offset, size in zip(index.offsets, index.sizes, strict=True)
    ]
    assert images == [b"first", b"third"]
    assert index.keys.tolist() == ["a/b.c/x1", "x3"]
    assert index.labels.tolist() == [7, -1]
    assert index.extensions.tolist() == ["jpg", "png"]
    assert (indexed.without_image, indexed.bytes) == (1, len(data))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x", "b.jpg": b"x", "a.cls": b"1"}, "contiguous"),
        ({"a.jpg": b"x", "a.png": b"x"}, "two images"),
        ({"a.jpg": b"x", "a.JPG": b"x"}, "twice"),
        ({"a.jpg": b""}, "empty"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "integer"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "integer"),
        ({"a.jpg": b"x", "a.cls": str(MAX_CLASSES).encode()}, "integer"),
        ({"a.jpg": b"x", "a.cls": b"1" * 10_000}, "integer"),
        ({"a.jpg": b"x", "a.cls": "\u0663".encode()}, "integer"),
        ({"../a.jpg": b"x"}, "leads out"),
        ({"/a.jpg": b"x"}, "leads out"),
    ],
)
def test_hostile_members_are_refused(
    tmp_path: Path, write_tar: WriteTar, members: dict[str, bytes], message: str
) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, members)
    with pytest.raises(TarError, match=message) as error:
        index_tar(path, lambda _: None)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.BLKTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(TarError, match="refused"):
        index_tar(path, lambda _: None)


def test_a_tar_that_is_cut_or_garbled_is_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"a.jpg": bytes(3000), "b.jpg": bytes(3000)})
    whole = path.read_bytes()
    for data in (whole[:2000], whole[:6000], b"x" * 1024, b""):
        path.write_bytes(data)
        with pytest.raises(TarError):
            index_tar(path, lambda _: None)


def test_sizes_beyond_the_file_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size = 2**40
    path = tmp_path / "a.tar"
    path.write_bytes(io.BytesIO(member.tobuf(tarfile.GNU_FORMAT)).getvalue() + bytes(9 * 1024))
    with pytest.raises(TarError, match="truncated"):
        index_tar(path, lambda _: None)
