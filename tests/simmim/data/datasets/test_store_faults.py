"""Servers that fail: each fault is survived, or ends in time with a message that has a remedy."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format import storage, stores
from data_prep.format.storage import RemotePath
from data_prep.format.stores import AccessError, StorageError
from data_prep.format.tars import walk_tar
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import ShardSet
from simmim.data.order.source import DataError
from simmim.data.settings import DataSettings
from tests.simmim.data.conftest import WriteShards, random_images

ATTEMPTS = 3


@dataclass
class Faults:
    """What a server does wrong, and how often it still does."""

    kind: str = ""
    left: int = 0
    suffix: str = ".tar"
    """Only of requests for such files."""
    requests: list[str] = field(default_factory=list)

    def take(self, path: str) -> str:
        """Return the fault of a request, "" for none."""
        self.requests.append(path)
        if self.left == 0 or not path.endswith(self.suffix):
            return ""
        self.left -= 1
        return self.kind


class Faulty(SimpleHTTPRequestHandler):
    """Sends parts of files, or what the test asks for instead."""

    def __init__(self, *arguments: object, faults: Faults, **options: object) -> None:
        self.faults = faults
        super().__init__(*arguments, **options)

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self._answer(path.read_bytes() if path.is_file() else b"")

    def _answer(self, content: bytes) -> None:
        path = Path(self.translate_path(self.path))
        fault = self.faults.take(self.path)
        if fault.isdigit():
            self.send_error(int(fault))
        elif fault == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
        elif fault == "silent":
            time.sleep(1.5)
        elif fault == "dropped":
            self.close_connection = True
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(content, path.stat().st_size, fault)

    def _send(self, content: bytes, total: int, fault: str) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self.send_response(200)
            length = total
        else:
            first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
            if fault == "less":
                content = content[: max(1, len(content) // 2)]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{total}")
            length = len(content)
        if fault == "short length" and self.command == "GET":
            length //= 2
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault in ("cut", "stalled") else content)
        if fault == "stalled":
            self.wfile.flush()
            time.sleep(1.5)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


class WholeFiles(Faulty):
    """Sends whole files, whatever part is asked for."""

    def _send(self, content: bytes, total: int, fault: str) -> None:
        del self.headers["Range"]
        super()._send(content, total, fault)


@contextmanager
def serving(handler: Callable[..., Faulty], port: int = 0) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    http = pytest.importorskip("fsspec.implementations.http", reason="pip install 'simmim[http]'")
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(stores, "TIMEOUT", 0.3)
    http.HTTPFileSystem.clear_instance_cache()  # they keep the timeout
    return Faults()


@pytest.fixture
def folder(write_shards: WriteShards) -> Path:
    return write_shards([11, 9, 14, 10], ("a", "b"), random_images(44))


@pytest.fixture
def served(folder: Path, faults: Faults, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of `folder` on a server of the class that the test asks for."""
    kind = getattr(request, "param", Faulty)
    with serving(partial(kind, directory=os.fspath(folder), faults=faults)) as port:
        yield f"http://127.0.0.1:{port}"
    stores.file_system("http://x").clear_instance_cache()


def reading(cache: Path, mode: str) -> RemoteReading:
    return RemoteReading(mode=mode, cache_dir=cache, attempts=ATTEMPTS)


@pytest.mark.parametrize("mode", ["shards", "ranges"])
@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "dropped", "cut", "less", "short length", "silent", "stalled"]
)
def test_faults_that_pass_are_survived(
    folder: Path, served: str, faults: Faults, tmp_path: Path, mode: str, fault: str
) -> None:
    remote = ShardSet(served, remote=reading(tmp_path / "cache", mode))
    remote.labels(2)  # opens it
    faults.kind, faults.left = fault, ATTEMPTS - 1
    assert remote.read(2, 5).image == ShardSet(folder).read(2, 5).image
    assert faults.left == 0


@pytest.mark.parametrize("mode", ["shards", "ranges"])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("500", "after 3 attempts.*500.*Check the address, the network"),
        ("403", "access is denied.*403.*Check the address and the credentials"),
        ("401", "access is denied.*401.*Check the address and the credentials"),
        ("404", "does not exist; restore it|is missing. Restore it"),
        ("loop", "after 3 attempts.*TooManyRedirects"),
        ("dropped", "after 3 attempts.*Disconnected"),
        ("silent", "after 3 attempts.*Timeout"),
    ],
)
def test_faults_that_stay_are_named(
    served: str, faults: Faults, tmp_path: Path, mode: str, opened: bool, fault: str, named: str
) -> None:
    remote = ShardSet(served, remote=reading(tmp_path / "cache", mode))
    if opened:
        remote.labels(2)
    faults.kind, faults.left = fault, -1
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"{served}/shard-000002\.tar.*({named})") as caught:
        remote.read(2, 5)
    before_the_reason = str(caught.value).partition("(")[0]
    assert before_the_reason.count("shard-000002.tar") == 1
    assert time.monotonic() - began < 3 * ATTEMPTS * 0.3 + 1.5
    if fault in ("401", "403"):
        assert len([path for path in faults.requests if path == "/shard-000002.tar"]) < 6


@pytest.mark.parametrize("fault", ["500", "silent", "403"])
def test_a_manifest_that_cannot_be_fetched_is_named(
    served: str, faults: Faults, fault: str
) -> None:
    faults.kind, faults.left, faults.suffix = fault, -1, ".json"
    with pytest.raises(ValueError, match=rf"{served}/manifest\.json.*Check the address"):
        DataSettings(shards=served, attempts=ATTEMPTS).open_shards()
    faults.left = ATTEMPTS - 1
    if fault != "403":
        assert DataSettings(shards=served, attempts=ATTEMPTS).open_shards().sizes


@pytest.mark.parametrize(("fault", "remedy"), [("500", "the network"), ("403", "the credentials")])
def test_an_index_that_cannot_be_fetched_is_not_to_be_made_again(
    served: str, faults: Faults, tmp_path: Path, fault: str, remedy: str
) -> None:
    faults.kind, faults.left, faults.suffix = fault, -1, ".npy"
    with pytest.raises(ValueError, match=rf"index {served}/shard-000002\.npy.*{remedy}") as caught:
        ShardSet(served, remote=reading(tmp_path, "ranges")).read(2, 5)
    assert "data-prep" not in str(caught.value)


@pytest.mark.parametrize("fault", ["cut", "500", "silent"])
@pytest.mark.parametrize("served", [WholeFiles], indirect=True)
def test_whole_files_that_are_always_cut_off_end(served: str, faults: Faults, fault: str) -> None:
    faults.kind, faults.left = fault, -1
    with pytest.raises(StorageError, match=r"after 3 attempts.*Check the address"):
        list(RemotePath(f"{served}/shard-000002.tar", attempts=ATTEMPTS).blocks())
    assert len(faults.requests) < 30  # of any length, since bytes that are new count as progress


@pytest.mark.parametrize("fault", ["500", "cut", "less", "silent"])
def test_a_tar_is_walked_by_ranges_that_are_retried(
    folder: Path, served: str, faults: Faults, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(storage, "_READ_AHEAD", 2048)
    names = [member.name for member in walk_tar(folder / "shard-000001.tar")]
    members = walk_tar(RemotePath(f"{served}/shard-000001.tar", attempts=ATTEMPTS))
    found = [next(members).name]
    faults.kind, faults.left = fault, 2
    assert [*found, *(member.name for member in members)] == names
    assert faults.left == 0
    faults.left = -1
    if fault != "less":
        with pytest.raises(StorageError, match=r"after 3 attempts.*Check the address"):
            list(walk_tar(RemotePath(f"{served}/shard-000001.tar", attempts=ATTEMPTS)))


def test_lengths_and_presence_are_asked_again(served: str, folder: Path, faults: Faults) -> None:
    path = RemotePath(f"{served}/shard-000001.tar", attempts=ATTEMPTS)
    for ask in (RemotePath.exists, RemotePath.content_length, RemotePath.size_and_stamp):
        faults.kind, faults.left = "500", 3  # HEAD and GET, and once more
        assert ask(path)
    faults.left = -1
    for ask in (RemotePath.exists, RemotePath.content_length, RemotePath.size_and_stamp):
        with pytest.raises(StorageError, match="after 3 attempts"):
            ask(path)
    faults.kind = "403"
    assert not path.exists()
    with pytest.raises(AccessError, match="access is denied"):
        path.stat()
    faults.kind = "404"
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        path.stat()


def test_a_server_that_is_restarted_meanwhile_is_waited_for(
    folder: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_BLOCK", 1024)
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.05)
    handler = partial(Faulty, directory=os.fspath(folder), faults=faults)
    with serving(handler) as port:
        path = RemotePath(f"http://127.0.0.1:{port}/shard-000002.tar")
        blocks = path.blocks()
        got = next(blocks)
    later = threading.Thread(target=lambda: (time.sleep(0.3), revive(handler, port)))
    later.start()
    assert got + b"".join(blocks) == (folder / "shard-000002.tar").read_bytes()
    later.join()


def revive(handler: Callable[..., Faulty], port: int) -> None:
    with serving(handler, port):
        time.sleep(1.0)


def test_a_server_that_is_gone_is_named_and_its_part_is_kept(
    folder: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_BLOCK", 1024)
    handler = partial(Faulty, directory=os.fspath(folder), faults=faults)
    with serving(handler) as port:
        remote = ShardSet(f"http://127.0.0.1:{port}", remote=reading(tmp_path / "cache", "shards"))
        remote.labels(2)
        read_block, reads = RemotePath._read_block, []

        def stop_serving(path: RemotePath, offset: int, size: int, system: object) -> bytes:
            reads.append(offset)
            faults.kind, faults.left = "dropped", -1 if len(reads) > 3 else 0
            return read_block(path, offset, size, system)

        monkeypatch.setattr(RemotePath, "_read_block", stop_serving)
        with pytest.raises(DataError, match=r"shard-000002\.tar.*after 3 attempts"):
            remote.read(2, 0)
        (partial_file,) = (tmp_path / "cache").glob("*.partial")
        assert partial_file.stat().st_size == 3 * 1024
        faults.left, reads[:] = 0, []
        monkeypatch.setattr(RemotePath, "_read_block", read_block)
        assert remote.read(2, 0).image == ShardSet(folder).read(2, 0).image


def test_a_redirect_is_followed(folder: Path, served: str, faults: Faults) -> None:
    class Elsewhere(Faulty):
        def _answer(self, _content: bytes) -> None:
            self.send_response(302)
            self.send_header("Location", served + self.path)
            self.end_headers()

    with serving(partial(Elsewhere, directory=os.fspath(folder), faults=Faults())) as port:
        remote = ShardSet(f"http://127.0.0.1:{port}", remote=RemoteReading(mode="ranges"))
        assert remote.read(2, 5).image == ShardSet(folder).read(2, 5).image


@pytest.mark.parametrize(
    ("fault", "named"), [("403", "access is denied"), ("500", "cannot be reached after 8 attempts")]
)
def test_data_prep_names_what_it_cannot_fetch(
    served: str,
    faults: Faults,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    named: str,
) -> None:
    faults.kind, faults.left = fault, -1
    url = f"{served}/shard-000001.tar"
    output = ["--output", str(tmp_path / "out"), "--workers", "1"]
    for command in (["index", url, *output], ["shard", url, str(tmp_path / "set")]):
        assert main(command) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"{url}" in told
        assert named in told
        assert "Traceback" not in told


def test_a_closed_port_is_named(faults: Faults) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ValueError, match=rf"{url}/manifest\.json.*after 3 attempts.*the network"):
        DataSettings(shards=url, attempts=ATTEMPTS).open_shards()


@pytest.mark.filterwarnings("default")  # the store's libraries have their own
@pytest.mark.parametrize("fault", ["500", "503", "403", "silent"])
def test_a_bucket_is_asked_as_often_as_is_said(
    faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    s3fs = pytest.importorskip("s3fs", reason="pip install 'simmim[s3]'")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with serving(partial(Faulty, directory=os.fspath(tmp_path), faults=faults)) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()  # they keep the address of an earlier server
        faults.kind, faults.left = fault, -1
        named = "access is denied" if fault == "403" else "after 3 attempts"
        with pytest.raises(StorageError, match=rf"s3://bucket/a\.tar.*{named}.*Check the address"):
            RemotePath("s3://bucket/a.tar", attempts=ATTEMPTS).read_range(5, 10)
        assert len(faults.requests) == (1 if fault == "403" else ATTEMPTS)
    s3fs.S3FileSystem.clear_instance_cache()
