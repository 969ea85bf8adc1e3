"""Training from shards that commands write."""

import shlex
from pathlib import Path

import pytest

from data_prep.cli import main
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import ShardSet
from simmim.data.order.source import DataError
from simmim.data.settings import DataSettings
from tests.simmim.data.conftest import WriteShards, random_images
from tests.simmim.data.datasets.test_remote import batches, held
from tests.simmim.data.loader.test_batches import equal, joined


@pytest.fixture
def folder(write_shards: WriteShards) -> Path:
    return write_shards([11, 9, 14, 10], ("a", "b"), random_images(44))


@pytest.fixture
def piped(folder: Path, tmp_path: Path) -> Path:
    """A set whose shards are what commands write, each of which leaves a line in `log`."""
    log, tars = shlex.quote(str(tmp_path / "log")), shlex.quote(str(folder))
    command = f"pipe:echo run >>{log}; cat {tars}/shard-{{000000..000003}}.tar"
    output = str(tmp_path / "piped")
    assert main(["index", command, "--output", output, "--allow-pipe", "--workers", "1"]) == 0
    (tmp_path / "log").unlink()
    return tmp_path / "piped"


@pytest.mark.parametrize("mode", ["auto", "shards", "ranges"])
def test_batches_are_those_from_disk(folder: Path, piped: Path, tmp_path: Path, mode: str) -> None:
    local = ShardSet(folder)
    limit = 2 * max(shard.bytes for shard in local.manifest.shards)  # of four
    reading = RemoteReading(
        mode=mode, cache_dir=tmp_path / "cache", cache_bytes=limit, allow_pipe=True
    )
    remote = ShardSet(str(piped), remote=reading)
    assert equal(joined(batches(remote)), joined(batches(local)))
    assert 0 < held(tmp_path / "cache") <= limit
    assert (tmp_path / "log").exists()


def test_commands_run_only_if_the_recipe_allows_them(piped: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data\.allow_pipe=true"):
        DataSettings(shards=str(piped), cache_dir=cache).open_shards()
    with pytest.raises(ValueError, match=r"data\.allow_pipe=true"):
        DataSettings(shards="pipe:echo run", allow_pipe=True).open_shards()  # without a manifest
    assert not (tmp_path / "log").exists()
    allowed = DataSettings(shards=str(piped), cache_dir=cache, allow_pipe=True)
    assert len(allowed.open_shards().read(0, 0).image)
    assert (tmp_path / "log").read_text() == "run\n"


def test_wrong_bytes_are_refused_and_endless_output_is_cut(
    folder: Path, piped: Path, tmp_path: Path
) -> None:
    reading = RemoteReading(cache_dir=tmp_path / "cache", allow_pipe=True)
    remote = ShardSet(str(piped), remote=reading)
    tar = folder / "shard-000000.tar"
    tar.write_bytes(b"x" * tar.stat().st_size)
    with pytest.raises(DataError, match="SHA-256 differed"):
        remote.read(0, 0)
    tar.unlink()
    tar.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="SHA-256 differed"):
        remote.read(0, 0)
