"""An S3 server on this machine, behind a proxy that drops and delays a tenth of the requests."""

import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.storage import RemotePath
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import ShardSet
from tests.simmim.data.datasets.test_remote import batches, held
from tests.simmim.data.loader.test_batches import equal, joined

BUCKET = "pictures"


class Unreliable(BaseHTTPRequestHandler):
    """Passes requests on to the server, or drops or delays them."""

    protocol_version = "HTTP/1.1"
    target = 0
    numbers = random.Random(5)
    counts = {"passed": 0, "dropped": 0, "delayed": 0}  # noqa: RUF012
    lock = threading.Lock()

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            drawn = self.numbers.random()
            kind = "dropped" if drawn < 0.05 else "delayed" if drawn < 0.1 else "passed"
            self.counts[kind] += 1
        if kind == "dropped":
            self.close_connection = True
            return
        if kind == "delayed":
            time.sleep(0.1)
        server = http.client.HTTPConnection("127.0.0.1", self.target, timeout=20)
        server.request(self.command, self.path, body or None, dict(self.headers))
        answer = server.getresponse()
        content = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        empty = self.command == "HEAD"
        length = answer.getheader("Content-Length", "0") if empty else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)
        server.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty prefix of a bucket behind the proxy."""
    s3fs = pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    Unreliable.target = port
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    s3fs.S3FileSystem.clear_instance_cache()  # they keep the address of an earlier server
    yield f"s3://{BUCKET}/{tmp_path.name}"
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()
    server.stop()


def kill_after(shards: int, arguments: list[str], staging: Path) -> None:
    """Run the command until it has uploaded so many shards."""
    command = [sys.executable, "-m", "data_prep", *arguments]
    with subprocess.Popen(
        command, start_new_session=True, cwd=Path(__file__).parents[4]
    ) as process:
        deadline = time.monotonic() + 200
        while sum(len(log.read_text().splitlines()) for log in logs(staging)) <= shards:
            assert process.poll() is None, "it ended before the kill"
            assert time.monotonic() < deadline, "it uploads nothing"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)


def logs(staging: Path) -> list[Path]:
    """Return the logs of what was uploaded: a line for the run, then one for each shard."""
    return list(staging.glob("*/.partial/uploaded.txt"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the server's and the store's libraries have their own
@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_shards_on_an_unreliable_store_give_the_batches_from_disk(
    bucket: str, tmp_path: Path, mode: str
) -> None:
    generator = np.random.default_rng(3)
    (tmp_path / "images").mkdir()
    for number in range(120):
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    source = str(tmp_path / "images")
    options = ["--samples-per-shard", "12", "--workers", "1"]
    staging = ["--staging", str(tmp_path / "staging")]
    assert main(["shard", source, str(tmp_path / "local"), *options]) == 0
    kill_after(3, ["shard", source, bucket, *options, *staging], tmp_path / "staging")
    with pytest.raises(ManifestError, match="is not finished"):
        read_manifest(bucket)
    assert main(["shard", source, bucket, *options[:2], "--workers", "2", *staging]) == 0
    assert not list((tmp_path / "staging").iterdir())
    assert {path.name: path.read_bytes() for path in RemotePath(bucket).glob("*")} == {
        path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()
    }
    assert main(["shard", source, bucket, *options, *staging]) == 0  # nothing to do
    assert main(["verify", bucket, "--workers", "1"]) == 0
    images = RemotePath(f"{bucket}-images")
    for path in (tmp_path / "images").iterdir():
        (images / path.name).upload(path)
    assert main(["shard", str(images), str(tmp_path / "fetched"), *options]) == 0
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "images").iterdir()):
            archive.write(path, path.name)
    packed = RemotePath(f"{bucket}-packed/all.zip")
    packed.upload(tmp_path / "all.zip")
    order = ["--shuffle-window", "30", *options]
    assert main(["shard", str(tmp_path / "all.zip"), str(tmp_path / "near"), *order]) == 0
    assert main(["shard", str(packed), str(tmp_path / "far"), *order]) == 0
    assert read_manifest(tmp_path / "near").shards == read_manifest(tmp_path / "far").shards
    local, remote = read_manifest(tmp_path / "local"), read_manifest(bucket)
    assert read_manifest(tmp_path / "fetched").samples == local.samples == 120
    assert (local.shards, local.options) == (remote.shards, remote.options)
    limit = 3 * max(shard.bytes for shard in local.shards)  # of ten
    reading = RemoteReading(mode=mode, cache_dir=tmp_path / "cache", cache_bytes=limit)
    far, near = ShardSet(bucket, remote=reading), ShardSet(tmp_path / "local")
    for workers in (0, 2):
        plan = batches(far, workers, end=240)
        assert equal(joined(plan), joined(batches(near, end=240)))
    if mode == "shards":
        assert 0 < held(tmp_path / "cache") <= limit
    assert Unreliable.counts["dropped"] > 5
    assert Unreliable.counts["delayed"] > 5
