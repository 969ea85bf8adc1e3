"""Folders, zips and tars list and read alike, and hostile members are reported."""

import gzip
import inspect
import io
import os
import resource
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from data_prep.format.tars import TarError
from data_prep.sources.files import Selection, SourceError, SourceFile, UnreadableFileError
from data_prep.sources.image_source import open_source
from data_prep.write.listing import SourceListing, survey_source, write_listing
from data_prep.write.options import ShardOptions


@dataclass(frozen=True, kw_only=True)
class _Listed:
    files: list[SourceFile]
    rejected: list[SourceFile]
    others: int
    fingerprint: str

    @property
    def found(self) -> int:
        return len(self.files) + len(self.rejected)


def _list(path: Path, **options: object) -> _Listed:
    selection = Selection(**options)
    chosen = ShardOptions(selection=selection, shuffle=False)
    with closing(open_source(path, selection)) as source, TemporaryDirectory() as folder:
        wanted = [selection.wants(file, explicit=source.is_explicit) for file in source.files()]
        listing: SourceListing = write_listing(source, chosen, Path(folder), None)
        assert survey_source(source, chosen) == listing.survey
        listed = _Listed(
            files=sorted(file for plan in listing.shards for file in listing.files(plan)),
            rejected=list(listing.refused()),
            others=wanted.count(False),
            fingerprint=listing.survey.fingerprint,
        )
    assert listed.found == listing.survey.found == wanted.count(True)
    return listed


def _problems(path: Path, **options: object) -> dict[str, str]:
    return {file.path: file.problem for file in _list(path, **options).rejected}


@pytest.mark.parametrize("kind", ["image_folder", "image_zip", "image_tar"])
def test_every_kind_lists_and_reads_alike(
    kind: str, image_files: dict[str, bytes], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    listing = _list(path)
    assert [file.path for file in listing.files] == sorted(image_files)
    assert listing.found == len(image_files)
    with closing(open_source(path)) as source:
        assert {file.path: source.read(file) for file in listing.files} == image_files
    assert _list(path).fingerprint == listing.fingerprint


@pytest.mark.parametrize("kind", ["image_folder", "image_zip", "image_tar"])
def test_globs_select(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    assert _list(path, include=("train/cat/*",)).found == 6
    assert _list(path, exclude=("test/*", "*.png")).found == 12
    assert _list(path, include=("train/*",), exclude=("*/cat/*",)).others == 12
    with pytest.raises(SourceError, match=r"no files that match \*\.tiff"):
        _list(path, include=("*.tiff",))


def test_hidden_and_other_files_are_left_out(image_folder: Path) -> None:
    found = _list(image_folder).found
    for name in (".thumb.jpg", ".cache/a.jpg", "__MACOSX/a.jpg", "readme.txt"):
        (image_folder / name).parent.mkdir(exist_ok=True)
        (image_folder / name).write_bytes(b"x")
    listing = _list(image_folder)
    assert (listing.found, listing.others) == (found, 4)


def test_links_in_a_folder_are_followed_but_not_in_circles(image_folder: Path) -> None:
    found = _list(image_folder).found
    (image_folder / "train" / "again").symlink_to(image_folder)
    (image_folder / "linked").symlink_to(image_folder / "test" / "cat")
    (image_folder / "broken.jpg").symlink_to(image_folder / "nowhere")
    (image_folder / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(image_folder / "pipe.jpg")
    listing = _list(image_folder)
    assert len(listing.files) == found + 6
    assert {file.path: file.problem for file in listing.rejected} == {
        "broken.jpg": "it is a broken link",
        "itself.jpg": "it is a link that leads back to itself",
        "pipe.jpg": "it is not a file",
    }


@pytest.mark.parametrize("ordered", [False, True])
def test_a_tree_may_be_deeper_than_calls_and_open_files(
    tmp_path: Path, draw_image: Callable[..., bytes], ordered: bool
) -> None:
    levels = 300  # each an open file, if the walk kept them
    place = tmp_path / "deep"
    for _ in range(levels):
        place.mkdir()
        place /= "d"
    place.mkdir()
    (place / "0.jpg").write_bytes(draw_image(0))
    (tmp_path / "deep" / "z.jpg").write_bytes(draw_image(1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    calls = sys.getrecursionlimit()
    few = 100 + max(int(link.name) for link in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        with closing(open_source(tmp_path / "deep", ordered=ordered)) as source:
            found = [(file.path, file.problem) for file in source.files()]
    finally:
        sys.setrecursionlimit(calls)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        (place / "0.jpg").unlink()  # what clears the folder of this test does so by recursion
        for _ in range(levels):
            place.rmdir()
            place = place.parent
    assert sorted(found) == [("d/" * levels + "0.jpg", ""), ("z.jpg", "")]


def test_a_change_changes_the_fingerprint(image_folder: Path) -> None:
    before = _list(image_folder).fingerprint
    os.utime(image_folder / "train/cat/0.jpg", (1, 1))
    touched = _list(image_folder).fingerprint
    (image_folder / "train/cat/0.jpg").unlink()
    assert len({before, touched, _list(image_folder).fingerprint}) == 3


def test_empty_and_overlong_files_are_rejected(image_folder: Path) -> None:
    (image_folder / "empty.jpg").touch()
    problems = _problems(image_folder, max_bytes=800)
    assert problems["empty.jpg"] == "it is empty"
    assert problems["train/owl/0.png"].endswith("more than --max-bytes 800")


def test_unsafe_members_of_a_tar_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    kinds = {
        "link.jpg": tarfile.SYMTYPE,
        "hard.jpg": tarfile.LNKTYPE,
        "device.jpg": tarfile.CHRTYPE,
        "pipe.jpg": tarfile.FIFOTYPE,
        "../up.jpg": tarfile.REGTYPE,
        "/absolute.jpg": tarfile.REGTYPE,
    }
    with tarfile.open(path, "w") as tar:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert _problems(path).keys() == kinds.keys()


def test_unsafe_members_of_a_zip_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "hostile.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../up.jpg", b"x")
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("huge.jpg", bytes(10**6), zipfile.ZIP_DEFLATED)
    assert _problems(path, max_bytes=10**5) == {
        "../up.jpg": "its path leads out of the archive",
        "link.jpg": "it is a link",
        "huge.jpg": "it declares 1,000,000 bytes, more than --max-bytes 100,000",
    }


def test_damage_in_a_zip_is_found_when_read(image_zip: Path) -> None:
    listing = _list(image_zip)
    data = bytearray(image_zip.read_bytes())
    for file in listing.files:
        data[file.offset + 30 + len(file.path) + file.stored // 2] ^= 0xFF
    image_zip.write_bytes(data)
    with closing(open_source(image_zip)) as source:
        for file in listing.files:
            with pytest.raises(UnreadableFileError):
                source.read(file)


def test_no_more_is_unpacked_than_declared(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(50 * 2**20))
    with closing(open_source(path)) as source:
        (file,) = source.files()
        with pytest.raises(UnreadableFileError, match="does not match"):
            source.read(file._replace(size=1000))


def test_a_file_that_vanished_is_unreadable(image_folder: Path) -> None:
    with (
        closing(open_source(image_folder)) as source,
        pytest.raises(UnreadableFileError, match="No such file"),
    ):
        source.read(SourceFile("gone.jpg", 1, 1))


def test_unsupported_sources_are_refused(tmp_path: Path, image_tar: Path) -> None:
    for name, data, message in (
        ("a.bin", b"text", "is not a folder, a zip or a tar"),
        ("a.csv.gz", gzip.compress(b"path,label\n"), "compressed list"),
        ("a.xlsx", b"PK", "spreadsheet"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(100), "zstd -d"),
        ("a.gz", gzip.compress(b"text"), "a.gz is truncated, damaged or not a tar"),
        ("a.tar.gz", gzip.compress(image_tar.read_bytes())[:-50], "a.tar.gz cannot be used"),
        ("b.tar", image_tar.read_bytes()[10:], "not a tar"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises((SourceError, TarError), match=message):
            _list(tmp_path / name)
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="is empty"):
        _list(tmp_path / "empty")


def test_a_cut_archive_is_named(image_tar: Path, image_zip: Path) -> None:
    image_tar.write_bytes(image_tar.read_bytes()[:9000])
    with pytest.raises(TarError, match=r"images\.tar is truncated"):
        _list(image_tar)
    data = image_zip.read_bytes()
    image_zip.write_bytes(data[:100] + data[-400:])
    with pytest.raises(SourceError, match=r"images\.zip"):
        _list(image_zip)


def test_a_member_of_negative_size_ends_the_walk(
    tmp_path: Path, write_tar: Callable[[Path, dict[str, bytes]], None]
) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size = -512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("first.jpg"))
    path = tmp_path / "loop.tar"
    path.write_bytes(stream.getvalue()[:512] + bytes(header) + bytes(10_240))
    with pytest.raises(TarError):
        _list(path)


@pytest.mark.parametrize("source", ["image_folder", "image_zip", "image_tar"])
def test_options_of_lists_are_refused_for_other_sources(
    source: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(source)
    with pytest.raises(SourceError, match=r"not a list: --root, --label-column would have no"):
        open_source(path, Selection(root="elsewhere", label_column="class"))
