"""Zips by every method that Python writes: the same bytes, or a problem that is named."""

import io
import lzma
import struct
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from data_prep.sources.files import UnreadableFileError
from data_prep.sources.image_source import open_source

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
PACKED = METHODS[1:]


def _zip(files: dict[str, bytes], method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _read(path: Path) -> dict[str, bytes]:
    with closing(open_source(path)) as source:
        files = list(source.files())
        assert [file.problem for file in files] == [""] * len(files)
        return {file.path: source.read(file) for file in files}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inner", METHODS)
def test_members_and_archives_in_them_are_read(
    inner: int, method: int, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    files = {"a/0.jpg": draw_image(0), "a/1.png": draw_image(1, image_format="PNG", size=200)}
    files["zeros.jpg"] = bytes(3 * 2**20)  # shrinks to next to nothing
    (tmp_path / "a.zip").write_bytes(_zip({**files, "b.zip": _zip(files, inner)}, method))
    assert _read(tmp_path / "a.zip") == files | {f"b.zip/{name}": files[name] for name in files}


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("place", ["0.jpg", "b.zip"])
def test_damaged_members_are_named(place: str, method: int, tmp_path: Path) -> None:
    """Whatever byte of the data is another one, no other contents come out."""
    content = _zip({"x.jpg": b"an image" * 40}, zipfile.ZIP_STORED)
    whole = _zip({place: content}, method)
    start = whole.index(place.encode()) + len(place)
    end = whole.index(b"PK\x01\x02", start)
    for number in range(start, end):
        data = bytearray(whole)
        data[number] ^= 0x55
        (tmp_path / "a.zip").write_bytes(data)
        with closing(open_source(tmp_path / "a.zip")) as source:
            (file,) = source.files()
            if file.problem:
                continue
            try:
                read = source.read(file)
            except UnreadableFileError:
                continue
            assert read in (content, b"an image" * 40)  # a byte that means nothing


@pytest.mark.parametrize("method", PACKED)
def test_no_more_is_unpacked_than_declared(method: int, tmp_path: Path) -> None:
    whole = _zip({"a.jpg": bytes(10**7)}, method)
    data = bytearray(whole)
    entry = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, entry + 24, 5_000)
    (tmp_path / "a.zip").write_bytes(data)
    with closing(open_source(tmp_path / "a.zip")) as source:
        (file,) = source.files()
        with pytest.raises(UnreadableFileError, match="length and checksum"):
            source.read(file._replace(problem=""))


def test_an_enormous_dictionary_takes_no_memory(tmp_path: Path) -> None:
    whole = bytearray(_zip({"a.jpg": b"an image" * 40}, zipfile.ZIP_LZMA))
    start = whole.index(b"a.jpg") + len("a.jpg")
    struct.pack_into("<I", whole, start + 5, 2**32 - 1)
    (tmp_path / "a.zip").write_bytes(whole)
    assert _read(tmp_path / "a.zip") == {"a.jpg": b"an image" * 40}


def test_lzma_without_an_end_mark_is_read(tmp_path: Path) -> None:
    content = b"an image" * 4_000
    alone = lzma.compress(content, lzma.FORMAT_ALONE)
    packed = b"\x09\x04\x05\x00" + alone[:5] + alone[13:]
    whole = bytearray(_zip({"a.jpg": content}, zipfile.ZIP_LZMA))
    entry = whole.index(b"PK\x01\x02")
    head = whole[:35]
    for block, place in ((head, 18), (whole, entry + 20)):
        struct.pack_into("<I", block, place, len(packed))
    end = len(head) + len(packed)
    struct.pack_into("<I", whole, whole.index(b"PK\x05\x06") + 16, end)
    (tmp_path / "a.zip").write_bytes(head + packed + whole[entry:])
    assert _read(tmp_path / "a.zip") == {"a.jpg": content}


def test_other_methods_are_named(tmp_path: Path) -> None:
    data = bytearray(_zip({"a.jpg": b"x" * 100}, zipfile.ZIP_DEFLATED))
    for place in (8, data.index(b"PK\x01\x02") + 10):
        struct.pack_into("<H", data, place, 9)
    (tmp_path / "a.zip").write_bytes(data)
    with closing(open_source(tmp_path / "a.zip")) as source:
        (file,) = source.files()
    assert file.problem == "its compression method 9 is not read here"
