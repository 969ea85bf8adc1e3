"""Tars cut at every length: no command takes one for whole, and none loses a sample in silence."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format.index import index_tar
from data_prep.format.manifest import ManifestError, read_manifest, write_manifest
from data_prep.format.tars import TarError, walk_tar
from data_prep.inspect.index_existing import IndexingOptions, index_existing
from data_prep.inspect.verify import verify_shards
from data_prep.sources.files import SourceError, SourceFile
from data_prep.sources.image_source import open_source
from data_prep.write.build import build_shards, merge_parts
from data_prep.write.options import RunOptions, ShardOptions
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import ShardSet

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
BLOCK = 512


def _write(path: Path, members: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Write a tar with as little behind its members as tars may have, and return its bytes."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        stop = tar.offset
    data = path.read_bytes()[: stop + 2 * BLOCK]
    path.write_bytes(data)
    return data


@pytest.fixture(scope="module")
def picture(draw_image: Callable[..., bytes]) -> bytes:
    """The smallest picture that is enough."""
    return draw_image(0, size=2, mode="L", image_format="PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    return tmp_path / "tars"


def _members(picture: bytes) -> dict[str, bytes]:
    full = picture.ljust(BLOCK, b"\0")  # its data ends with a block
    return {"a.cls": b"3", "a.png": picture, "b.cls": b"", "b.png": full}


def _cuts(whole: bytes, path: Path, step: int = 1) -> Iterator[int]:
    """Cut a file at every length, or at every one of some, longest first."""
    for length in range(len(whole) - 1, -1, -step):
        os.truncate(path, length)
        yield length


EVERY = [
    pytest.param(67, id="some"),
    pytest.param(1, id="every", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
]


@pytest.mark.parametrize(
    "name", ["ustar", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gnu", "pax"))]
)
def test_no_cut_is_a_whole_tar(name: str, picture: bytes, folder: Path) -> None:
    long_name = "x/" * 60 + "y.png"  # takes headers of its own, except in ustar
    members = {"a.cls": b"3", "a.png": picture.ljust(BLOCK, b"\0"), long_name: picture}
    whole = _write(folder / "a.tar", members, FORMATS[name])
    assert len(list(walk_tar(folder / "a.tar"))) == 3
    for length in _cuts(whole, folder / "a.tar"):
        with pytest.raises(TarError) as error:
            list(walk_tar(folder / "a.tar"))
        assert "a.tar" in str(error.value), length


def test_what_is_allowed_to_lack_its_end_has_all_data(picture: bytes, folder: Path) -> None:
    """With leave, a cut is accepted only between members, and never without a warning."""
    members = _members(picture)
    whole = _write(folder / "a.tar", members)
    stops = [0]
    for data in members.values():
        stops.append(stops[-1] + BLOCK + -(-len(data) // BLOCK) * BLOCK)
    lengths = list(map(len, members.values()))
    for length in _cuts(whole, folder / "a.tar"):
        said: list[str] = []
        try:
            found = [one.name for one in walk_tar(folder / "a.tar", missing_end=said.append)]
        except TarError:
            continue
        assert len(said) == 1, length
        assert "a.tar" in said[0]
        assert found == list(members)[: len(found)]
        # The data of the last member is whole, and no header of another has begun.
        last = len(found) - 1
        assert length >= stops[last] + BLOCK + lengths[last]
        assert not any(whole[stops[len(found)] : length])


@pytest.mark.parametrize("zeros", [0, 1, BLOCK, 2 * BLOCK - 1])
def test_a_tar_without_end_is_refused_or_accepted_with_a_warning(
    zeros: int, picture: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = _write(folder / "a.tar", {"a.cls": b"3", "a.png": picture})
    (folder / "a.tar").write_bytes(whole[: len(whole) - 2 * BLOCK + zeros])
    out = folder.parent
    alone = ["--workers", "1"]
    commands = [
        ["index", str(folder), *alone],
        ["verify", str(folder), *alone],
        ["verify", str(folder), "--deep", *alone],
        ["reshard", str(folder), str(out / "resharded"), *alone],
        ["shard", str(folder / "a.tar"), str(out / "sharded"), *alone],
    ]
    for command in commands:
        if command[0] == "verify":  # of a set that was indexed before tars were looked at so
            manifest = read_manifest(folder)
            write_manifest(replace(manifest, options={}))
        assert main(command) == 2
        assert "--allow-missing-end" in capsys.readouterr().err
        assert main([*command, "--allow-missing-end"]) == 0
        output = capsys.readouterr()
        assert "WARNING" in output.err
        assert "a.tar" in output.err
        if command[0] == "index":  # leave is given for good
            assert main(["verify", str(folder), *alone]) == 0
            assert "WARNING" in capsys.readouterr().err
    sample = ShardSet(out / "resharded").read(0, 0)
    assert (sample.image, sample.label) == (picture, 3)


def _without_options(manifest):
    from dataclasses import replace

    return replace(manifest, options={})


def test_index_verify_and_training_refuse_every_cut(
    picture: bytes, folder: Path, tmp_path: Path
) -> None:
    path = folder / "a.tar"
    whole = _write(path, {"a.cls": b"3", "a.png": picture, "b.png": picture})
    manifest = index_existing(folder).manifest
    reading = RemoteReading(attempts=1)
    assert verify_shards(manifest, decode=True).count == 0
    for length in _cuts(whole, path):
        with pytest.raises(TarError):
            index_tar(path, lambda _: None)
        assert verify_shards(manifest, decode=False).count == 1, length
        with pytest.raises(ValueError, match=r"a\.tar"):
            ShardSet(folder, remote=reading).read(0, 0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.index.npy",
        "a.tar",
        "manifest.json",
    ]


def test_shard_and_reshard_refuse_every_cut(picture: bytes, folder: Path) -> None:
    path = folder / "a.tar"
    whole = _write(path, {"a.cls": b"3", "a.png": picture, "b.png": picture})
    for _ in _cuts(whole, path):
        for place, shards in ((path, False), (folder, True)):
            with pytest.raises((TarError, SourceError), match=r"a\.tar"):
                _list(place, shards=shards)


def _list(place: Path, *, shards: bool) -> list[SourceFile]:
    with closing(open_source(place, shards=shards)) as source:
        return list(source.files())


def test_a_cut_tar_inside_a_tar_is_counted(picture: bytes, folder: Path) -> None:
    inner = _write(folder / "inner.tar", {"a.png": picture, "b.png": picture})
    for length in range(BLOCK, len(inner), 64):
        _write(folder / "outer.tar", {"cat.tar": inner[:length], "dog.tar": inner})
        with closing(open_source(folder / "outer.tar")) as source:
            files = list(source.files())
        assert [file.path for file in files if file.problem == _INNER] == ["cat.tar"], length
        assert [file.path for file in files if not file.problem][-2:] == [
            "dog.tar/a.png",
            "dog.tar/b.png",
        ]


_INNER = "it is a cut, damaged or compressed tar"


@pytest.mark.parametrize("step", EVERY)
def test_merge_refuses_a_cut_shard(step: int, picture: bytes, tmp_path: Path) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for number in range(2):
        (source / f"{number}.png").write_bytes(picture)
    options = ShardOptions(samples_per_shard=1)
    for part in (1, 2):
        build_shards(source, out, options, run=RunOptions(part=(part, 2)))
    path = out / ".partial" / "shard-000001.tar"
    whole = path.read_bytes()
    for length in _cuts(whole, path, step):
        with pytest.raises(ValueError, match="lacks 1 of 2 shards"):
            merge_parts(out)
        assert path.exists(), length
    path.write_bytes(whole)
    assert merge_parts(out).samples == 2


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_every_cut_of_a_compressed_tar_is_refused(
    compress: Callable[[bytes], bytes], picture: bytes, folder: Path
) -> None:
    whole = compress(_write(folder / "a.tar", {"a.png": picture, "b.png": picture}))
    for length in _cuts(whole, folder / "a.tar"):
        with pytest.raises(TarError):
            list(walk_tar(folder / "a.tar"))
        if length % 8:
            continue
        with pytest.raises((TarError, ManifestError)):
            index_existing(folder)
        with (
            pytest.raises((TarError, SourceError)),
            closing(open_source(folder, shards=True)) as source,
        ):
            list(source.files())
        with (
            pytest.raises((TarError, SourceError)),
            closing(open_source(folder / "a.tar")) as source,
        ):
            list(source.files())


def test_data_behind_the_end_and_between_members_is_not_lost(picture: bytes, folder: Path) -> None:
    one = _write(folder / "a.tar", {"a.png": picture})
    for data, message in (
        (one + one, "behind its end"),
        (one[: -2 * BLOCK] + bytes(BLOCK) + one, "behind its end"),
        (one[: -2 * BLOCK] + b"x" * BLOCK + one, "no header"),
    ):
        (folder / "a.tar").write_bytes(data)
        for allowed in (False, True):
            options = IndexingOptions(allow_missing_end=allowed)
            with pytest.raises(TarError, match=message):
                index_existing(folder, options=options)
    (folder / "a.tar").write_bytes(one + bytes(20 * BLOCK))  # as GNU tar fills up
    assert index_existing(folder).manifest.samples == 1
