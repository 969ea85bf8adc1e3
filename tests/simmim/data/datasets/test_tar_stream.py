"""Tars without a manifest, read in sequence: layouts, sources, damage, and what is never run."""

import io
import os
import pickle
import shlex
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path

import pytest
import webdataset

from data_prep.format.tars import TarError, stream_tar, walk_tar
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.stream import LeftOut, StreamSettings, TarStream, open_stream
from simmim.data.order.source import DataError
from tests.simmim.data.conftest import random_images

READING = RemoteReading(attempts=1, allow_pipe=True)


def write_tars(folder: Path, sizes: list[int], image_key: str = "png") -> Path:
    """Write tars of images by webdataset's ShardWriter, the last one shorter."""
    folder.mkdir(exist_ok=True)
    images = iter(random_images(sum(sizes)))
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{number:03d}.tar"), encoder=False) as writer:
            for row in range(size):
                writer.write({"__key__": f"{number}-{row:04d}", image_key: next(images)})
    return folder


def add(path: Path, members: dict[str, bytes]) -> None:
    """Write a tar of these members, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def opened(tars: object, **options: object) -> TarStream:
    settings = StreamSettings(tars=str(tars), **{"samples": 100, "shuffle": 4} | options)
    return open_stream(settings, READING)


def names(
    stream: TarStream,
    *,
    rank: int = 0,
    world: int = 1,
    began: int = 0,
    left_out: list[LeftOut] | None = None,
) -> list[str]:
    report = (lambda _: None) if left_out is None else left_out.append
    images = stream.images(rank=rank, world=world, workers=1, seed=0, began=began, report=report)
    return [image.name for image in images]


def test_ranks_read_every_sample_once_in_another_order_in_each_pass(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path / "tars", [30, 30, 7]))
    alone = names(stream)
    assert len(set(alone)) == len(alone) == 67
    assert names(stream) == alone
    assert names(stream, began=100) != alone
    assert sorted(names(stream, began=100)) == sorted(alone)
    ranks = [name for rank in range(3) for name in names(stream, rank=rank, world=3)]
    assert sorted(ranks) == sorted(alone)
    # The buffer mixes what the tars have in order.
    assert [name for name in alone if name[:3] == "000"] != sorted(
        name for name in alone if name[:3] == "000"
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of `tmp_path` on a local server."""
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=os.fspath(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_folder_pattern_url_and_command_read_the_same(tmp_path: Path, served: str) -> None:
    folder = write_tars(tmp_path / "tars", [9, 8, 4])
    (folder / "000.parquet").write_bytes(b"beside")  # as img2dataset leaves it
    read = names(opened(folder))
    command = f"pipe:cat {shlex.quote(str(folder))}/{{000..002}}.tar"
    for tars in (
        f"{folder}/{{000..002}}.tar",
        f"{folder}/*.tar",
        f"{served}/tars/{{000..002}}.tar",
        f"{served}/tars",
        command,
    ):
        assert names(opened(tars)) == read, tars
    with pytest.raises(ValueError, match=r"data\.stream\.tars: .*set data\.allow_pipe to true"):
        open_stream(StreamSettings(tars=command, samples=21), RemoteReading())


def test_a_crawlers_layout_and_other_names_of_images(tmp_path: Path) -> None:
    (picture,) = random_images(1)
    layout = {"0.jpg": picture, "0.txt": b"a cat", "0.json": b"{}", "1.txt": b"x", "1.json": b"{}"}
    add(tmp_path / "a.tar", layout)
    left_out: list[LeftOut] = []
    assert names(opened(tmp_path), left_out=left_out) == ["a.tar/0"]
    assert [(one.kind, one.key, one.reason) for one in left_out] == [("no image", "1", ".txt")]

    add(tmp_path / "a.tar", {"0.Image.PNG": picture, "0.mask.png": b"?", "1.input.jpeg": picture})
    assert names(opened(tmp_path, image_key="image.png")) == ["a.tar/0"]
    (image,) = opened(tmp_path, image_key="input.jpeg").first_images(5)
    assert (image.key, image.extension, image.image) == ("1", "jpeg", picture)
    with pytest.raises(ValueError, match=r"no image can be read.*image_key"):
        opened(tmp_path).first_images(5)


def test_the_first_images_are_those_of_the_first_tar_that_has_some(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", [6, 6, 6])
    add(folder / "000.tar", {})
    whole = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(whole[:700])
    assert [one.name for one in opened(folder).first_images(2)] == [
        "002.tar/2-0000",
        "002.tar/2-0001",
    ]
    (folder / "002.tar").unlink()
    with pytest.raises(
        ValueError, match=r"from \S+000\.tar and 1 tar after it: .*is truncated"
    ) as cut:
        opened(folder).first_images(2)
    assert "image_key" not in str(cut.value)


def test_damage_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", [6, 6, 6, 6, 6])
    whole = [(folder / f"{number:03d}.tar").read_bytes() for number in range(5)]
    (folder / "000.tar").write_bytes(whole[0][: len(whole[0]) // 2])
    header = whole[1].index(b"1-0003.png")
    (folder / "001.tar").write_bytes(whole[1][:header] + b"\xff" * 512 + whole[1][header + 512 :])
    (folder / "002.tar").write_bytes(whole[2].rstrip(b"\0"))
    (folder / "003.tar").write_bytes(b"<html>not found</html>")
    left_out: list[LeftOut] = []
    read = Counter(name[:3] for name in names(opened(folder), left_out=left_out))
    assert read["001"] == 3
    assert read["004"] == 6
    assert 0 < read["000"] < 6
    assert "003" not in read
    assert sorted((one.shard_name, one.kind) for one in left_out) == [
        (f"{number:03d}.tar", "skipped") for number in range(4)
    ]
    with pytest.raises(ValueError, match=r"data\.stream\.tars: .*005.tar"):
        opened(f"{folder}/{{004..005}}.tar")
    stream = opened(f"{folder}/004.tar")
    (folder / "004.tar").unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        names(stream)


def test_a_sequential_tar_is_refused_where_an_index_refuses_it(tmp_path: Path) -> None:
    whole = (write_tars(tmp_path, [3]) / "000.tar").read_bytes()
    path = tmp_path / "cut.tar"
    for length in range(0, len(whole) + 1, 256):
        path.write_bytes(whole[:length])
        try:
            members = [member.name for member in walk_tar(path)]
        except TarError:
            with pytest.raises(TarError):
                list(stream_tar(path, iter([path.read_bytes()])))
        else:
            assert [one.name for one, _ in stream_tar(path, iter([whole]))] == members
    with pytest.raises(TarError, match="goes on behind"):
        list(stream_tar(path, iter([whole, whole])))
    with pytest.raises(TarError, match="goes on behind"):  # endless
        list(stream_tar(path, chain([whole], repeat(bytes(2**20)))))


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_tar_is_unpickled_or_run(tmp_path: Path) -> None:
    (picture,) = random_images(1)
    mark, pickled = tmp_path / "run", pickle.dumps(Mark(tmp_path / "run"))
    members = {f"a.{name}": pickled for name in ("pyd", "pkl", "pickle", "pth", "ten", "mp")}
    tars = tmp_path / "tars"
    tars.mkdir()
    add(tars / "a.tar", {"a.png": picture, **members, "b.pyd": pickled, "c.jpg": pickled})
    assert sorted(names(opened(tars))) == ["a.tar/a", "a.tar/c"]
    for refused in (f"file://{tars}", "gopen:x", f"{tars}/a.tar::x://y", "ssh://host/a.tar"):
        with pytest.raises(ValueError, match=r"data\.stream\.tars"):
            opened(refused)
    assert not mark.exists()


def test_settings_say_how_to_count_and_what_an_image_key_is() -> None:
    with pytest.raises(ValueError, match=r"`data-prep index 'a b' --output FOLDER` counts them"):
        StreamSettings(tars="a b")
    with pytest.raises(ValueError, match=r"KEY\.image\.png"):
        StreamSettings(tars="a", samples=1, image_key="json")
    command = StreamSettings(tars="pipe:cat a.tar", samples=1, image_key="x.png").index_command
    assert command == (
        "data-prep index 'pipe:cat a.tar' --output FOLDER --image-key x.png --allow-pipe"
    )
