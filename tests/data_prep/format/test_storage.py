"""Remote locations: reading, retries, sources and refusals."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest

from data_prep.cli import main
from data_prep.format import storage
from data_prep.format.index import read_index
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.statistics_file import read_statistics, write_statistics
from data_prep.format.storage import RemotePath, StorageError, locate
from data_prep.inspect.contact_sheet import draw_contact_sheet
from data_prep.inspect.index_existing import index_existing
from data_prep.inspect.info import describe_shards
from data_prep.inspect.statistics import measure_set
from data_prep.inspect.verify import verify_shards
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions


@pytest.fixture
def store() -> Iterator[RemotePath]:
    """An empty folder in a store in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield RemotePath("memory://bucket")
    system.store.clear()


@pytest.fixture
def remote_set(store: RemotePath, image_folder: Path, tmp_path: Path) -> RemotePath:
    """A set of shards in the store."""
    built = build_shards(image_folder, tmp_path / "set", ShardOptions(samples_per_shard=8))
    for path in (tmp_path / "set").iterdir():
        (store / path.name).upload(path)
    assert built.manifest.samples == 24
    return store


def test_a_remote_path_answers_as_a_local_one(store: RemotePath, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    for path in (tmp_path / "a.bin", store / "a.bin"):
        path.write_bytes(data)
        assert path.read_bytes() == data
        assert path.stat().st_size == len(data)
        assert path.name == "a.bin"
        assert path.stem == "a"
        assert path.exists()
        assert not (path.parent / "b.bin").exists()
        assert [found.name for found in path.parent.glob("*.bin")] == ["a.bin"]
        with path.open("rb") as file:
            file.seek(1000)
            assert file.read(7) == data[1000:1007]
        path.unlink()
        path.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            path.read_bytes()
    (store / "c.bin").write_bytes(data)
    assert (store / "c.bin").read_range(5, 10) == data[5:15]
    assert b"".join((store / "c.bin").blocks(3)) == data[3:]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("pipe:cat /etc/passwd", "refused here.*allow_pipe"),
        ("pipe://cat", "refused here.*allow_pipe"),
        ("file:///etc", "refused"),
        ("ssh://host/set", "refused"),
        ("simplecache::s3://bucket/set", "chains"),
        ("s3://bucket/a.zip::memory://x", "chains"),
        ("zip://a.jpg::s3://bucket/a.zip", "chains"),
    ],
)
def test_urls_that_run_commands_or_chain_are_refused(url: str, reason: str) -> None:
    with pytest.raises(StorageError, match=reason):
        locate(url)
    with pytest.raises(ValueError, match=reason):
        read_manifest(url)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b", "NUL"),
        ("s3://bucket/a\0b", "NUL"),
        ("half \ud800", "half a character"),
        ("http://", "names no host or bucket"),
        ("s3:///", "names no host or bucket"),
    ],
)
def test_what_no_file_can_be_called_is_named_as_such(place: str, reason: str) -> None:
    with pytest.raises(StorageError, match=reason) as caught:
        locate(place)
    assert str(caught.value).isprintable()
    assert locate("bytes \udcff").name == "bytes \udcff"


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="the extra is installed")
def test_a_missing_extra_is_named_with_its_command() -> None:
    with pytest.raises(ValueError, match=r"pip install 'simmim\[gcs\]'"):
        read_manifest("gs://bucket/set")


def test_failed_requests_are_retried_and_then_reported(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "a").write_bytes(b"data")
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    failures = iter([OSError("reset"), TimeoutError("slow"), None])
    whole = fsspec.filesystem("memory").cat_file

    def flaky(*arguments: object, **options: object) -> bytes:
        if (error := next(failures, None)) is not None:
            raise error
        return bytes(whole(*arguments, **options))

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", staticmethod(flaky))
    assert (store / "a").read_bytes() == b"data"
    failures = iter([OSError("reset")] * 3)
    with pytest.raises(StorageError, match=r"memory://bucket/a cannot .* 2 attempts .*reset"):
        (replace(store, attempts=2) / "a").read_bytes()


def test_a_remote_set_is_described_and_measured(remote_set: RemotePath, tmp_path: Path) -> None:
    far, near = read_manifest(str(remote_set)), read_manifest(tmp_path / "set")
    assert describe_shards(far).splitlines()[1:] == describe_shards(near).splitlines()[1:]
    draw_contact_sheet(far, tmp_path / "far.png")
    draw_contact_sheet(near, tmp_path / "near.png")
    assert (tmp_path / "far.png").read_bytes() == (tmp_path / "near.png").read_bytes()
    write_statistics(far, measure_set(far).statistics)
    assert read_statistics(far) == tuple(measure_set(near).statistics)


def test_a_remote_set_is_read_and_verified(remote_set: RemotePath, tmp_path: Path) -> None:
    manifest = read_manifest(str(remote_set))
    local = read_manifest(tmp_path / "set")
    assert manifest.shards == local.shards
    for shard in manifest.shards:
        remote, near = read_index(remote_set, shard), read_index(local.folder, shard)
        assert remote.keys.tolist() == near.keys.tolist()
        assert remote.offsets.tolist() == near.offsets.tolist()
    assert verify_shards(manifest, decode=True).count == 0
    damaged = bytearray((remote_set / "shard-000001.tar").read_bytes())
    damaged[600] ^= 1
    (remote_set / "shard-000001.tar").write_bytes(bytes(damaged))
    assert any(
        "shard-000001.tar" in problem for problem in verify_shards(manifest, decode=True).problems
    )
    (remote_set / "shard-000000.tar").unlink()
    assert any(
        "shard-000000.tar" in problem for problem in verify_shards(manifest, decode=True).problems
    )


@pytest.mark.parametrize("place", ["folder", "pattern"])
def test_remote_tars_are_indexed_in_place_or_elsewhere(
    remote_set: RemotePath, tmp_path: Path, place: str
) -> None:
    promised = read_manifest(tmp_path / "set").shards
    (remote_set / "manifest.json").unlink()
    source = remote_set if place == "folder" else remote_set / "shard-{000000..000002}.tar"
    elsewhere = index_existing(source, output=tmp_path / "indexes").manifest
    assert [shard.place for shard in elsewhere.shards] == [
        f"memory://bucket/shard-{number:06}.tar" for number in range(3)
    ]
    assert not (remote_set / "manifest.json").exists()
    read = read_manifest(tmp_path / "indexes")
    assert verify_shards(read, decode=True).count == 0
    beside = index_existing(source).manifest
    for found in (elsewhere, beside, read_manifest(remote_set)):
        assert [shard.sha256 for shard in found.shards] == [shard.sha256 for shard in promised]
    with pytest.raises(ManifestError, match="--overwrite"):
        index_existing(source)


def test_a_local_pattern_is_indexed(
    tmp_path: Path, image_files: dict[str, bytes], write_tar: Callable[..., None]
) -> None:
    for number in range(4):
        write_tar(tmp_path / f"part-{number:02}.tar", {f"{number}.jpg": b"not decoded here"})
    assert main(["index", str(tmp_path / "part-{01..02}.tar")]) == 0
    assert [shard.name for shard in read_manifest(tmp_path).shards] == [
        "part-01.tar",
        "part-02.tar",
    ]
    assert main(["index", str(tmp_path / "part-{03..09}.tar"), "--overwrite"]) == 2


@pytest.mark.parametrize(
    ("changes", "remote"),
    [
        ({"name": "../shard-000000.tar"}, False),
        ({"name": "/etc/shard.tar"}, False),
        ({"name": "s3://other/shard.tar"}, False),
        ({"index": "../x.npy"}, False),
        ({"place": "https://elsewhere.example/shard-000000.tar"}, True),
        ({"place": "/etc/shard-000000.tar"}, True),
        ({"place": "pipe:cat shard-000000.tar"}, False),
        ({"place": "../shard-000000.tar"}, False),
        ({"place": "s3://bucket/../shard-000000.tar"}, False),
        ({"place": "s3://bucket/other.tar"}, False),
        ({"place": 3}, False),
    ],
)
def test_hostile_entries_are_refused(
    remote_set: RemotePath, tmp_path: Path, changes: dict[str, object], remote: bool
) -> None:
    folder = remote_set if remote else tmp_path / "set"
    values = json.loads((folder / "manifest.json").read_text())
    values["shards"][0] |= changes
    (folder / "manifest.json").write_bytes(json.dumps(values).encode())
    with pytest.raises(ManifestError):
        read_manifest(folder)


ALONE = ("--workers", "1")  # another process has another store in memory


@pytest.fixture
def remote_images(image_folder: Path) -> Iterator[RemotePath]:
    """The images of a folder, in a store."""
    place = RemotePath("memory://photos/all")
    for path in sorted(image_folder.rglob("*")):
        if path.is_file():
            (place / path.relative_to(image_folder).as_posix()).upload(path)
    yield place
    fsspec.filesystem("memory").store.clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.tar"))}


def test_a_folder_of_a_store_is_a_source(
    remote_images: RemotePath, image_folder: Path, tmp_path: Path
) -> None:
    assert main(["shard", str(remote_images), str(tmp_path / "far"), *ALONE]) == 0
    assert main(["shard", str(image_folder), str(tmp_path / "near")]) == 0
    far, near = (read_manifest(tmp_path / name) for name in ("far", "near"))
    assert (far.samples, far.classes) == (near.samples, near.classes)
    keys = [read_index(far.folder, shard).keys.tolist() for shard in far.shards]
    assert keys == [read_index(near.folder, shard).keys.tolist() for shard in near.shards]
    again = contents(tmp_path / "far")
    assert main(["shard", str(remote_images), str(tmp_path / "far"), *ALONE]) == 0
    assert contents(tmp_path / "far") == again
    (remote_images / "new.png").write_bytes(b"other")
    assert main(["shard", str(remote_images), str(tmp_path / "far"), *ALONE]) == 2


def test_a_list_names_images_of_a_store(
    remote_images: RemotePath, image_folder: Path, tmp_path: Path
) -> None:
    names = [path for path, _, _ in remote_images.walk()]
    assert names == sorted(
        path.relative_to(image_folder).as_posix()
        for path in image_folder.rglob("*")
        if path.is_file()
    )
    (tmp_path / "list.txt").write_text("\n".join([*names, "missing.jpg"]) + "\n")
    command = [
        "shard",
        str(tmp_path / "list.txt"),
        str(tmp_path / "set"),
        "--max-rejected",
        "1",
        *ALONE,
    ]
    assert main([*command, "--root", str(remote_images)]) == 0
    manifest = read_manifest(tmp_path / "set")
    assert manifest.samples + manifest.rejected == len(names) + 1
    assert "missing.jpg" in (tmp_path / "set" / "rejected.jsonl").read_text()


@pytest.mark.parametrize("kind", ["image_zip", "image_tar"])
@pytest.mark.parametrize("order", [(), ("--no-shuffle",)])
def test_archives_in_a_store_give_the_bytes_of_those_on_disk(
    kind: str,
    order: tuple[str, ...],
    store: RemotePath,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(kind)
    (store / path.name).upload(path)
    assert main(["shard", str(path), str(tmp_path / "near"), *order]) == 0
    for _ in range(2):
        far = [str(store / path.name), str(tmp_path / "far"), *order, *ALONE]
        assert main(["shard", *far]) == 0
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_a_tar_of_class_tars_in_a_store(
    image_tar: Path, store: RemotePath, tmp_path: Path, write_tar: Callable[..., None]
) -> None:
    write_tar(tmp_path / "outer.tar", {"all.tar": image_tar.read_bytes(), "bad.tar": b"x" * 999})
    (store / "outer.tar").upload(tmp_path / "outer.tar")
    allowed = ("--max-rejected", "1")
    assert main(["shard", str(tmp_path / "outer.tar"), str(tmp_path / "near"), *allowed]) == 0
    assert main(["shard", str(store / "outer.tar"), str(tmp_path / "far"), *allowed, *ALONE]) == 0
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    assert read_manifest(tmp_path / "far").rejected == 1


def test_lists_and_shards_in_a_store_are_sources(
    remote_images: RemotePath, image_folder: Path, tmp_path: Path
) -> None:
    names = [path for path, _, _ in remote_images.walk()]
    (image_folder / "list.csv").write_text("path,label\n" + "".join(f"{n},a\n" for n in names))
    (remote_images / "list.csv").upload(image_folder / "list.csv")
    assert main(["shard", str(image_folder / "list.csv"), str(tmp_path / "near")]) == 0
    assert main(["shard", str(remote_images / "list.csv"), str(tmp_path / "far"), *ALONE]) == 0
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    for path in (tmp_path / "near").iterdir():
        (remote_images.parent / "set" / path.name).upload(path)
    shards = str(remote_images.parent / "set")
    assert main(["reshard", str(tmp_path / "near"), str(tmp_path / "set")]) == 0
    assert main(["reshard", shards, str(tmp_path / "again"), *ALONE]) == 0
    far, near = (read_manifest(tmp_path / name) for name in ("again", "set"))
    assert (far.samples, far.classes) == (near.samples, near.classes) == (24, ("a",))


def test_a_reader_of_parts_reads_ahead_in_order_alone(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 400
    (store / "a.bin").write_bytes(data)
    asked: list[tuple[int, int]] = []
    read_range = RemotePath.read_range

    def noted(path: RemotePath, offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return read_range(path, offset, size)

    monkeypatch.setattr(RemotePath, "read_range", noted)
    monkeypatch.setattr(storage, "_READ_AHEAD", 1000)
    reader = storage.ByteReader(store / "a.bin")
    for offset in (50_000, 70_000, 20_000, 90_000):
        assert reader.read(offset, 100) == data[offset : offset + 100]
    assert asked == [(50_000, 100), (70_000, 100), (20_000, 100), (90_000, 100)]
    asked.clear()
    for offset in range(90_100, len(data) + 500, 100):
        assert reader.read(offset, 100) == data[offset : offset + 100]
    assert len(asked) == 13
    assert reader.read(len(data) + 5000, 100) == b""


def test_remote_locations_that_are_not_folders_are_refused(
    remote_images: RemotePath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", "memory://photos/none", str(tmp_path / "set")]) == 2
    assert "memory://photos/none does not exist" in capsys.readouterr().err
    assert main(["reshard", str(remote_images), str(tmp_path / "set")]) == 2
    assert "no tars" in capsys.readouterr().err
    (remote_images / "a.tar").write_bytes(b"no tar" * 1000)
    assert main(["shard", str(remote_images / "a.tar"), str(tmp_path / "set")]) == 2
    assert "not a tar" in capsys.readouterr().err
    assert main(["shard", "pipe:cat images", str(tmp_path / "set")]) == 2
    assert "would run a command" in capsys.readouterr().err
