"""Everything that is met and not taken is counted by kind, printed, and kept in the manifest."""

import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format.manifest import MANIFEST_NAME, ManifestError, read_manifest

ODD = [
    "a.heic",
    "a.jxl",
    "a.npz",
    "a.dcm",
    "a.ico",
    "a.jpg?width=100",
    "ILSVRC2012",
    "readme.txt",
    "b.jpg.txt",
    ".hidden.jpg",
    "__MACOSX/a.jpg",
]
SKIPPED = {
    ".heic": 1,
    ".jxl": 1,
    ".npz": 1,
    ".dcm": 1,
    ".ico": 1,
    ".jpg with a query": 1,
    "no suffix": 1,
    ".txt": 2,
    "hidden": 2,
}
EXAMPLES = {
    **{f".{suffix}": [f"a.{suffix}"] for suffix in ("heic", "jxl", "npz", "dcm", "ico")},
    ".jpg with a query": ["a.jpg?width=100"],
    "no suffix": ["ILSVRC2012"],
    ".txt": ["b.jpg.txt", "readme.txt"],
    "hidden": [".hidden.jpg", "__MACOSX/a.jpg"],
}


def _pack(kind: str, folder: Path, files: dict[str, bytes]) -> Path:
    """Write files as a folder, a zip or a tar."""
    path = folder / f"source.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    path = folder / "source"
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    if kind == "tar":
        with tarfile.open(folder / "source.tar", "w") as tar:
            tar.add(path, arcname="")
        return folder / "source.tar"
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("options", [(), ("--no-shuffle",)])
def test_what_is_not_taken_is_counted_printed_and_kept(
    kind: str,
    options: tuple[str, ...],
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = _pack(kind, tmp_path, {**dict.fromkeys(ODD, b"odd"), "cat/0.jpg": draw_image(0)})
    command = ["shard", str(source), str(tmp_path / "out"), "--workers", "1", *options]
    assert main(command) == 0
    assert read_manifest(tmp_path / "out").skipped == SKIPPED
    assert read_manifest(tmp_path / "out").skipped_examples == EXAMPLES
    printed = capsys.readouterr().out
    assert ".txt (2)" in printed
    assert "\n  .txt: b.jpg.txt, readme.txt\n" in printed
    assert "no suffix (1)" in printed
    assert main(["info", str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert ".heic (1)" in printed
    assert " .heic: a.heic\n" in printed


@pytest.mark.parametrize("options", [(), ("--no-shuffle",)])
def test_the_first_three_paths_of_a_kind_are_named(
    options: tuple[str, ...],
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"{folder}/{number}\x1b.heic" for folder in "zmka" for number in range(3)]
    source = _pack("folder", tmp_path, {**dict.fromkeys(names, b"odd"), "cat/0.jpg": draw_image(0)})
    assert main(["shard", str(source), str(tmp_path / "out"), *options]) == 0
    first = [f"a/{number}\x1b.heic" for number in range(3)]
    assert read_manifest(tmp_path / "out").skipped_examples == {".heic": first}
    shown = ", ".join(f"a/{number}\\x1b.heic" for number in range(3))
    assert f"skipped: .heic (12)\n  .heic: {shown}, ...\n" in capsys.readouterr().out
    path = tmp_path / "out" / MANIFEST_NAME
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "skipped_examples": {".heic": "a"}}))
    with pytest.raises(ManifestError, match="skipped_examples"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_that_are_not_read_are_said(
    kind: str,
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = _pack(kind, tmp_path, {"a/0.jpg": draw_image(0), "a/0.cls": b"3"})
    assert main(["shard", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "skipped: .cls (1); labels in .cls are read from" in capsys.readouterr().out


def test_parts_and_choices_count_too(tmp_path: Path, draw_image: Callable[..., bytes]) -> None:
    files = {f"cat/{number}.jpg": draw_image(number) for number in range(4)}
    source = _pack("folder", tmp_path, {**files, "a.txt": b"text", "dog/0.jpg": draw_image(5)})
    choice = ["--exclude", "cat/3*", "--samples-per-shard", "2", "--workers", "1"]
    for part in ("1/2", "2/2"):
        command = ["shard", str(source), str(tmp_path / "out"), "--part", part, *choice]
        assert main(command) == 0
    assert main(["merge", str(tmp_path / "out")]) == 0
    assert read_manifest(tmp_path / "out").skipped == {".txt": 1, "matches --exclude": 1}
    assert main(["shard", str(source), str(tmp_path / "dogs"), "--include", "dog/*"]) == 0
    assert read_manifest(tmp_path / "dogs").skipped == {"does not match --include": 5}


def test_an_empty_choice_names_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _pack("zip", tmp_path, dict.fromkeys(ODD, b"odd"))
    assert main(["shard", str(source), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert ".heic (1)" in printed
    assert "--include" in printed


def test_a_manifest_of_before_has_skipped_nothing(tmp_path: Path, image_folder: Path) -> None:
    assert main(["shard", str(image_folder), str(tmp_path / "out"), "--workers", "1"]) == 0
    path = tmp_path / "out" / MANIFEST_NAME
    assert "skipped" not in json.loads(path.read_text())
    assert read_manifest(tmp_path / "out").skipped == {}


@pytest.mark.parametrize("pattern", ["*.{jpg,png}", "*.JpG"])
def test_a_pattern_that_matches_nothing_says_how_patterns_are_read(
    pattern: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shard", str(image_folder), str(tmp_path / "out"), "--include", pattern]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert f"no files that match {pattern}" in shown
    assert "case matters, and braces are not expanded: repeat --include" in shown
