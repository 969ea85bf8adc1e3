"""A full disk, at whatever write, is an error that names the file and what to do."""

import errno
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.format.manifest import MANIFEST_NAME, read_manifest


@dataclass
class _Disk:
    """A disk on which only so many bytes can be written."""

    room: int | None = None
    """Bytes that can still be written; None: any number."""
    sizes: list[int] = field(default_factory=list)
    """Bytes written so far, after each write."""

    def take(self, length: int) -> None:
        if self.room is not None and length > self.room:
            self.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.room is not None:
            self.room -= length
        self.sizes.append((self.sizes[-1] if self.sizes else 0) + length)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> _Disk:
    """A disk behind every file that is opened for writing."""
    disk, real = _Disk(), io.open

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            disk.take(len(data))
            return super().write(data)

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **names: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax"):
            return real(file, mode, buffering, *rest, **names)
        raw = io.BufferedWriter(File(file, mode.replace("b", "")), max(buffering, 8192))
        if "b" in mode:
            return raw
        return io.TextIOWrapper(raw, *rest, **names)

    monkeypatch.setattr(io, "open", open_file)
    return disk


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def sources(tmp_path: Path, draw_image: Callable[..., bytes]) -> Path:
    """Folders `images` and `shards`, a compressed tar and a list, of two images each."""
    files = {"cat/0.jpg": draw_image(0, size=8), "dog/1.jpg": draw_image(1, size=8), "e.jpg": b"x"}
    for name, data in files.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    _tar(tmp_path / "images.tar.gz", files)
    (tmp_path / "list.txt").write_text("images/cat/0.jpg\timages\nimages/dog/1.jpg\tdog\n")
    assert main(["shard", str(tmp_path / "images"), str(tmp_path / "shards"), *_OPTIONS]) == 0
    return tmp_path


_OPTIONS = ("--workers=1", "--max-rejected=0.5", "--samples-per-shard=1")


@pytest.mark.parametrize(
    "command",
    [
        ("shard", "images"),
        ("shard", "images", "--no-shuffle"),
        ("shard", "images", "--deduplicate"),
        ("shard", "images.tar.gz"),
        ("shard", "list.txt"),
        ("reshard", "shards"),
    ],
)
def test_every_write_of_shards(
    command: tuple[str, ...],
    sources: Path,
    disk: _Disk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk is full at each write in turn; with room again the same command finishes."""
    name, source, *more = command
    arguments = [name, str(sources / source), str(sources / "out"), *more, *_OPTIONS]
    assert main(arguments) == 0
    whole = (sources / "out" / MANIFEST_NAME).read_bytes()
    sizes = sorted(set(disk.sizes))
    assert len(sizes) > 5
    for size in sizes:
        disk.room = None
        for path in (sources / "out").iterdir():
            path.unlink()
        disk.room = size - 1
        capsys.readouterr()
        assert main(arguments) == 2
        _check_message(capsys.readouterr().err, sources)
        disk.room = None
        assert main(arguments) == 0
        assert (sources / "out" / MANIFEST_NAME).read_bytes() == whole


def _check_message(printed: str, folder: Path) -> None:
    assert "disk is full" in printed
    assert str(folder) in printed or "/data-prep-" in printed  # a temporary file
    assert "unnamed" not in printed
    assert "run the same command again" in printed
    assert "Traceback" not in printed


def test_every_write_of_merge(
    sources: Path, disk: _Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_parts(out: Path) -> None:
        for part in ("1/2", "2/2"):
            command = ["shard", str(sources / "images"), str(out), *_OPTIONS[:1], "--part", part]
            assert main(command) == 0

    write_parts(sources / "a")
    disk.sizes.clear()
    merge = ["merge", str(sources / "a"), "--max-rejected", "0.5"]
    assert main(merge) == 0
    sizes = sorted(set(disk.sizes))
    for number, size in enumerate(sizes):
        out = sources / f"out{number}"
        disk.room = None
        write_parts(out)
        disk.room = size - 1
        capsys.readouterr()
        assert main(["merge", str(out), "--max-rejected", "0.5"]) == 2
        _check_message(capsys.readouterr().err, sources)
        disk.room = None
        assert main(["merge", str(out), "--max-rejected", "0.5"]) == 0
        assert read_manifest(out).samples == 2


def test_every_write_of_index(
    sources: Path, disk: _Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ["index", str(sources / "shards"), "--output", str(sources / "out"), "--workers", "1"]
    assert main(index) == 0
    for size in sorted(set(disk.sizes)):
        disk.room = None
        for path in (sources / "out").iterdir():
            path.unlink()
        disk.room = size - 1
        assert main(index) == 2
        _check_message(capsys.readouterr().err, sources)
        disk.room = None
        assert main(index) == 0
        assert read_manifest(sources / "out").samples == 2


def test_workers_name_the_file_too(
    sources: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An error of a full disk keeps its path on the way from a worker."""
    import pickle

    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error.filename = str(tmp_path / "a.tar")
    assert pickle.loads(pickle.dumps(error)).filename == error.filename
