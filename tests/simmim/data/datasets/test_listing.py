"""Images of a folder are listed; everything else is skipped and counted."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.format.manifest import IMAGE_SUFFIXES as SHARDED_SUFFIXES
from simmim.data.datasets.listing import IMAGE_SUFFIXES, list_images
from simmim.data.order.source import DataError

NAMES = st.sampled_from(["a.jpg", "b.PNG", "c.txt", "d", ".e.jpg", "f.tar.gz", "g.JPEG"])
FOLDERS = st.lists(st.sampled_from(["x", "y.jpg", ".z", "w w"]), max_size=3)


def test_images_are_what_data_prep_takes_for_images() -> None:
    assert {suffix.decode() for suffix in IMAGE_SUFFIXES} == SHARDED_SUFFIXES


@settings(max_examples=40, deadline=None)
@given(files=st.lists(st.tuples(FOLDERS, NAMES), max_size=20))
def test_every_file_is_found_or_counted(
    files: list[tuple[list[str], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    for folders, name in files:
        place = folder.joinpath(*folders)
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"content")
    expected, hidden, others = [], 0, 0
    for place, folders, names in os.walk(folder):
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith((".jpg", ".png", ".jpeg")) and name[0] != ".":
                expected.append(os.fsencode(Path(place, name).relative_to(folder)))
            elif name[0] != ".":
                others += 1
    listing = list_images(folder)
    assert listing.paths == sorted(expected)
    assert listing.skipped["hidden"] == hidden
    assert listing.skipped.total() == hidden + others


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / "a").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "1.jpg").write_bytes(b"1")
    (folder / "a" / "2.jpg").symlink_to(elsewhere / "1.jpg")
    (folder / "b").symlink_to(elsewhere)
    (folder / "a" / "up").symlink_to(folder)
    (elsewhere / "self").symlink_to("self")
    (elsewhere / "gone").symlink_to("nowhere")
    (elsewhere / "notes.txt").symlink_to(elsewhere / "1.jpg")
    listing = list_images(folder)
    assert listing.paths == [b"a/2.jpg", b"b/1.jpg"]
    assert listing.skipped == {"circular links": 1, "broken links": 2, ".txt": 1}
    assert listing.remarks == "skipped: broken links (2), .txt (1), circular links (1)"


def test_a_circle_of_two_links_ends(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(b"1")
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    listing = list_images(tmp_path)
    assert listing.paths == [b"a/a.png", b"a/other/b.png", b"b/b.png", b"b/other/a.png"]
    assert listing.skipped == {"circular links": 2}


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    for name in ("cat", "dog", "empty", "texts", "of/empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cat" / "1.webp").write_bytes(b"1")
    (tmp_path / "dog" / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "dog" / "deep" / "deeper" / "2.npy").write_bytes(b"1")
    (tmp_path / "texts" / "read me").write_bytes(b"1")
    listing = list_images(tmp_path)
    assert listing.without_images == ("empty", "of", "texts")
    assert listing.remarks == (
        "skipped: no suffix (1); folders without images (3): empty, of, texts"
    )


def test_non_files_with_an_image_suffix_are_counted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "1.jpg").write_bytes(b"1")
    listing = list_images(tmp_path)
    assert listing.paths == [b"folder.jpg/1.jpg"]
    assert listing.skipped == {"pipes, sockets or devices": 1}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone/? cannot be listed \(No such file"):
        list_images(tmp_path / "gone")


def test_kinds_are_those_of_data_prep(tmp_path: Path) -> None:
    """A query in each name once made a kind of its own of each file."""
    names = [f"{number}.jpg?width={number}" for number in range(60)]
    for name in (*names, "a.HEIC", "a.tar.gz", "IM.0001", "IM.0002", "__MACOSX", "a.jpg"):
        (tmp_path / name).write_bytes(b"content")
    listing = list_images(tmp_path)
    assert listing.paths == [b"a.jpg"]
    assert listing.skipped == {
        ".jpg with a query": 60,
        ".heic": 1,
        ".tar.gz": 1,
        "numbered suffix": 2,
        "hidden": 1,
    }


def test_a_folder_that_vanishes_while_it_is_listed_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"content")
    scan = os.scandir

    def scan_and_remove(path: bytes | int) -> object:
        if isinstance(path, bytes) and path.rstrip(b"/") != os.fsencode(
            tmp_path
        ):  # the three folders are found by now
            for other in {"cat", "dog", "owl"} - {Path(os.fsdecode(path)).name}:
                shutil.rmtree(tmp_path / other, ignore_errors=True)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_and_remove)
    listing = list_images(tmp_path)
    assert len(listing.paths) == 1
    assert listing.skipped == {"vanished while listed": 2}
