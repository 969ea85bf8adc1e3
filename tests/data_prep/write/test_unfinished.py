"""Sets that are not finished: every reader says so, and how to finish them."""

from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.storage import RemotePath
from simmim.data.datasets.opening import open_set
from simmim.data.datasets.remote import RemoteReading


@pytest.fixture
def unfinished(image_zip: Path, tmp_path: Path) -> Path:
    """The first of two parts."""
    folder = tmp_path / "out"
    options = ["--part", "1/2", "--samples-per-shard", "5", "--workers", "1"]
    assert main(["shard", str(image_zip), str(folder), *options]) == 0
    return folder


@pytest.mark.parametrize("command", ["info", "verify", "index", "reshard"])
@pytest.mark.parametrize("moved", [False, True])
def test_commands_refuse_a_set_that_is_not_finished(
    command: str,
    moved: bool,
    unfinished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if moved:  # as by a run killed after its first shards moved up
        name = "shard-000000.tar"
        (unfinished / ".partial" / name).rename(unfinished / name)
    outputs = [str(tmp_path / "new")] if command == "reshard" else []
    assert main([command, str(unfinished), *outputs, "--workers", "1"]) == 2
    message = capsys.readouterr().err
    assert "is not finished" in message
    assert "same `data-prep shard`" in message
    assert f"data-prep merge {unfinished}" in message
    assert "classes of images" not in message
    assert not (unfinished / "manifest.json").exists()


@pytest.mark.parametrize("pattern", ["", "/*.tar"])
def test_training_refuses_a_set_that_is_not_finished(unfinished: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is not finished.*same `data-prep shard`"):
        open_set(f"{unfinished}{pattern}", RemoteReading())


def test_an_upload_that_is_not_finished_is_named() -> None:
    place = RemotePath("memory://unfinished/set")
    (place / "uploading.txt").write_bytes(b"run\nmachine\n")
    (place / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"is not finished.*same `data-prep shard`"):
        read_manifest(place)


def test_a_hidden_folder_of_another_program_is_no_unfinished_set(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    with pytest.raises(ManifestError, match="classes of images"):
        read_manifest(tmp_path)
