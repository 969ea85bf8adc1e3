"""Folders are written atomically."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swinv2.atomic import OccupiedError, atomic_folder


def everything_under(folder: Path) -> list[str]:
    return sorted(str(place.relative_to(folder)) for place in folder.rglob("*"))


def write_half(destination: Path, failure: type[BaseException]) -> None:
    with atomic_folder(destination, may_replace=lambda _: True) as folder:
        (folder / "file").write_text("half")
        raise failure


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    destination = tmp_path / "a" / "b" / "run"
    with atomic_folder(destination) as folder:
        assert folder.parent == destination.parent
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
        assert not destination.exists()
    assert everything_under(destination.parent) == ["run", "run/inner", "run/inner/file"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure):
        write_half(tmp_path / "a" / "b" / "run", failure)
    assert everything_under(tmp_path) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    destination = tmp_path / "run"
    destination.mkdir()
    (destination / "file").write_text("earlier")
    with pytest.raises(RuntimeError):
        write_half(destination, RuntimeError)
    assert everything_under(tmp_path) == ["run", "run/file"]
    assert (destination / "file").read_text() == "earlier"


def test_a_folder_is_replaced_only_if_allowed(tmp_path: Path) -> None:
    destination = tmp_path / "run"
    with atomic_folder(destination) as folder:
        (folder / "old").touch()
    with pytest.raises(OccupiedError, match="run"), atomic_folder(destination):
        pytest.fail("the block must not start")
    with atomic_folder(destination, may_replace=lambda place: (place / "old").exists()) as folder:
        (folder / "new").touch()
    assert everything_under(tmp_path) == ["run", "run/new"]


def test_a_folder_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    destination = tmp_path / "run"
    writing = atomic_folder(destination)
    (writing.__enter__() / "mine").touch()
    destination.mkdir()
    (destination / "theirs").touch()
    with pytest.raises(OccupiedError):
        writing.__exit__(None, None, None)
    assert everything_under(tmp_path) == ["run", "run/theirs"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "file").touch()
    assert everything_under(tmp_path) == ["run", "run/file"]


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for destination in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(OccupiedError, match="file"), atomic_folder(destination):
            pytest.fail("the block must not start")
    assert everything_under(tmp_path) == ["file"]


def test_the_target_of_a_symbolic_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").exists()


def test_what_appears_at_the_last_moment_is_not_removed(tmp_path: Path) -> None:
    destination = tmp_path / "run"
    destination.mkdir()
    (destination / "export").touch()
    asked = 0

    def may_replace(place: Path) -> bool:
        nonlocal asked
        asked += 1
        answer = (place / "export").exists()
        if asked == 2:  # the last check before the swap
            (place / "export").unlink()
            (place / "theirs").touch()
        return answer

    writing = atomic_folder(destination, may_replace=may_replace)
    (writing.__enter__() / "mine").touch()
    with pytest.raises(OccupiedError, match=f"{destination} holds other files"):
        writing.__exit__(None, None, None)
    assert everything_under(tmp_path) == ["run", "run/theirs"]


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed(tmp_path: Path, dead: int) -> None:
    names = [f".run.partial-{dead}", f".run.replaced-{dead}", f".run.partial-{os.getppid()}"]
    for name in [*names, f".other.partial-{dead}", "run"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic_folder(tmp_path / "run", may_replace=lambda _: True) as folder:
        (folder / "new").touch()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run", f".run.partial-{os.getppid()}", f".other.partial-{dead}"}
    assert everything_under(tmp_path / "run") == ["new"]


def test_a_folder_lost_between_two_renames_returns(tmp_path: Path, dead: int) -> None:
    earlier = tmp_path / f".run.replaced-{dead}"
    earlier.mkdir()
    (earlier / "file").write_text("earlier")
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "run", RuntimeError)
    assert everything_under(tmp_path) == ["run", "run/file"]


@pytest.mark.parametrize("role", ["partial", "replaced"])
def test_what_an_earlier_process_of_the_same_number_left_is_removed(
    tmp_path: Path, role: str
) -> None:
    """In a container, a program has the same number at each start."""
    for name in (f".run.{role}-{os.getpid()}", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic_folder(tmp_path / "run", may_replace=lambda _: True) as folder:
        (folder / "new").touch()
    assert everything_under(tmp_path) == ["run", "run/new"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_permissions_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "inner").mkdir()
            (folder / "plain").touch()
            for private in (folder / "private", folder / "inner" / "private"):
                private.touch(0o600)  # as tempfile and safetensors create files
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert len(files) == 3
