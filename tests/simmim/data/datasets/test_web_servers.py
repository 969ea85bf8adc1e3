"""Shards on web servers, with and without range requests."""

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from data_prep.format.storage import RemotePath
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import ShardSet
from simmim.data.order.source import DataError
from tests.simmim.data.conftest import WriteShards, random_images
from tests.simmim.data.datasets.test_remote import batches, held
from tests.simmim.data.loader.test_batches import equal, joined


class WholeFiles(SimpleHTTPRequestHandler):
    """Sends whole files, whatever part is asked for, and cuts the first tars off."""

    cuts = 0
    """Answers with a tar that are still cut off."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.suffix != ".tar" or type(self).cuts == 0:
            super().do_GET()
            return
        type(self).cuts -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        self.wfile.write(path.read_bytes()[:700])

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


class Parts(WholeFiles):
    """Sends the part that is asked for."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            super().do_GET()
            return
        first, last = asked.removeprefix("bytes=").split("-")
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)


class Untold(WholeFiles):
    """Sends whole files and does not say how long they are."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        path = self._answer()
        if path is not None:
            self.wfile.write(path.read_bytes())

    def _answer(self) -> Path | None:
        path = Path(self.translate_path(self.path))
        self.send_response(200 if path.is_file() else 404)
        self.end_headers()
        return path if path.is_file() else None


@pytest.fixture
def folder(write_shards: WriteShards) -> Path:
    return write_shards([11, 9, 14, 10], ("a", "b"), random_images(44))


@pytest.fixture
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of `folder` on a server of the class that the test asks for."""
    pytest.importorskip("aiohttp")
    handler = partial(request.param, directory=os.fspath(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("served", "mode"),
    [(WholeFiles, "shards"), (Parts, "shards"), (Parts, "ranges"), (Untold, "shards")],
    indirect=["served"],
)
def test_batches_are_those_from_disk(folder: Path, served: str, tmp_path: Path, mode: str) -> None:
    local = ShardSet(folder)
    limit = 2 * max(shard.bytes for shard in local.manifest.shards)  # of four
    reading = RemoteReading(mode=mode, cache_dir=tmp_path / "cache", cache_bytes=limit)
    remote = ShardSet(served, remote=reading)
    assert equal(joined(batches(remote)), joined(batches(local)))
    if mode == "shards":
        assert 0 < held(tmp_path / "cache") <= limit


@pytest.mark.parametrize("served", [WholeFiles], indirect=True)
def test_ranges_of_a_server_without_them_are_refused_by_name(served: str) -> None:
    remote = ShardSet(served, remote=RemoteReading(mode="ranges"))
    with pytest.raises(DataError, match=rf"{served}/shard-000001\.tar.*whole files.*data\.remote"):
        remote.read(1, 0)


@pytest.mark.parametrize("served", [WholeFiles], indirect=True)
def test_an_interrupted_whole_file_is_requested_again(
    folder: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RemotePath(f"{served}/shard-000002.tar")
    whole = (folder / "shard-000002.tar").read_bytes()
    monkeypatch.setattr(WholeFiles, "cuts", 2)  # of the look for parts, and of the file
    assert b"".join(path.blocks()) == whole
    assert WholeFiles.cuts == 0
    assert b"".join(path.blocks(len(whole) - 100)) == whole[-100:]


@pytest.mark.parametrize("served", [WholeFiles], indirect=True)
def test_what_sends_whole_files_only_is_indexed_verified_and_shown(
    folder: Path, served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ["--workers", "1"]
    pattern = served + "/shard-{000000..000003}.tar"
    assert main(["index", pattern, "--output", str(tmp_path / "set"), *alone]) == 0
    found = [shard.sha256 for shard in read_manifest(tmp_path / "set").shards]
    assert found == [shard.sha256 for shard in read_manifest(folder).shards]
    for place in (served, str(tmp_path / "set")):
        for look in (["verify"], ["verify", "--deep"], ["info"]):
            assert main([look[0], place, *look[1:], *alone]) == 0
    tar = folder / "shard-000002.tar"
    tar.write_bytes(b"\1" * tar.stat().st_size)
    capsys.readouterr()
    assert main(["verify", served, *alone]) == 2
    assert (
        f"{served}/shard-000002.tar is truncated, damaged or not a tar" in capsys.readouterr().err
    )


@pytest.mark.parametrize("served", [Untold], indirect=True)
def test_files_of_unknown_length_are_measured(folder: Path, served: str, tmp_path: Path) -> None:
    for path in folder.iterdir():
        far = RemotePath(f"{served}/{path.name}")
        assert far.stat().st_size == far.size_and_stamp()[0] == path.stat().st_size
        assert far.content_length() is None
    image = np.zeros((8, 8, 3), np.uint8)
    np.save(folder / "a.npy", image)
    (tmp_path / "list.txt").write_text("a.npy\n")
    command = ["shard", str(tmp_path / "list.txt"), str(tmp_path / "set"), "--root", served]
    assert main(command) == 0
    assert read_manifest(tmp_path / "set").samples == 1
