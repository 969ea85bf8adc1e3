"""Shards at URLs: the same batches as from disk, within the limits of the cache."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from data_prep.format.storage import RemotePath
from simmim.data.datasets.remote import RemoteReading, ShardCache
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batches import TrainingBatches
from simmim.data.loader.sampler import ShardPrefetcher
from simmim.data.order.order import Address, SampleOrder
from simmim.data.order.source import DataError
from tests.simmim.data.conftest import WriteShards
from tests.simmim.data.loader.test_batches import TRAIN, equal, joined


@pytest.fixture
def folder(write_shards: WriteShards) -> Path:
    return write_shards([11, 9, 14, 10], ("a", "b"))


@pytest.fixture
def store(folder: Path) -> Iterator[RemotePath]:
    """The shards of `folder` in a store in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    place = RemotePath("memory://training/set", attempts=1)
    for path in folder.iterdir():
        (place / path.name).upload(path)
    yield place
    system.store.clear()


def batches(shards: ShardSet, workers: int = 0, end: int = 88) -> TrainingBatches:
    order = SampleOrder(shards.sizes, seed=1, slots=4)
    return TrainingBatches(
        shards,
        order,
        TRAIN,
        batch_size=8,
        start_position=0,
        end_position=end,
        workers=workers,
    )


def held(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("mode", ["shards", "ranges", "auto"])
@pytest.mark.parametrize("workers", [0, 2])
def test_remote_batches_are_those_from_disk(
    folder: Path, store: RemotePath, tmp_path: Path, mode: str, workers: int
) -> None:
    local = ShardSet(folder)
    limit = 2 * max(shard.bytes for shard in local.manifest.shards)  # of four
    reading = RemoteReading(mode=mode, cache_dir=tmp_path / "cache", cache_bytes=limit)
    remote = ShardSet(str(store), remote=reading)
    assert remote.digest == local.digest
    assert remote.fetches_whole_shards == (mode == "shards")
    found = joined(batches(remote, workers))
    assert equal(found, joined(batches(local)))
    if mode == "shards":
        assert 0 < held(tmp_path / "cache") <= limit


def test_auto_fetches_whole_shards_where_they_fit_and_most_of_them_is_read(
    store: RemotePath, tmp_path: Path
) -> None:
    remote = ShardSet(str(store), remote=RemoteReading(cache_dir=tmp_path / "cache"))
    assert remote.fetches_whole_shards
    assert not remote.share(0.05, seed=1).fetches_whole_shards


class CountedSource:
    """A local file as the source of a shard, which counts its fetches."""

    def __init__(self, path: Path, cut: int | None = None) -> None:
        self.path, self.cut, self.starts = path, cut, []

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        self.starts.append(start)
        data = self.path.read_bytes()[start:]
        if self.cut is not None:
            yield data[: self.cut]
            raise ConnectionError("dropped")
        time.sleep(0.05)
        yield data


def test_many_readers_fetch_a_shard_once(folder: Path, tmp_path: Path) -> None:
    entry = ShardSet(folder).manifest.shards[0]
    source = CountedSource(folder / entry.name)
    cache = ShardCache(tmp_path / "cache", entry.bytes)
    threads = [threading.Thread(target=cache.fetch, args=(entry, source)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.starts == [0]
    assert cache.read(entry, source, 5, 100) == (folder / entry.name).read_bytes()[5:105]


def test_an_interrupted_fetch_resumes_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    entry = ShardSet(folder).manifest.shards[0]
    cache = ShardCache(tmp_path / "cache", entry.bytes)
    with pytest.raises(ConnectionError):
        cache.fetch(entry, CountedSource(folder / entry.name, cut=700))
    source = CountedSource(folder / entry.name)
    cache.fetch(entry, source)
    assert source.starts == [700]


def test_the_least_recently_read_is_evicted(folder: Path, tmp_path: Path) -> None:
    entries = ShardSet(folder).manifest.shards[:3]
    limit = sum(sorted(entry.bytes for entry in entries)[1:])
    cache = ShardCache(tmp_path / "cache", limit)
    sources = [CountedSource(folder / entry.name) for entry in entries]
    for place in (0, 1, 0, 2, 0):
        cache.read(entries[place], sources[place], 0, 1)
        time.sleep(0.01)
    assert [len(source.starts) for source in sources] == [1, 1, 1]
    cache.read(entries[1], sources[1], 0, 1)
    assert len(sources[1].starts) == 2
    assert held(tmp_path / "cache") <= limit


def test_shards_that_differ_from_the_manifest_are_refused(folder: Path, tmp_path: Path) -> None:
    entry = ShardSet(folder).manifest.shards[0]
    wrong = replace(entry, sha256="0" * 64)
    cache = ShardCache(tmp_path / "cache", entry.bytes)
    with pytest.raises(DataError, match=f"{entry.name}.*SHA-256"):
        cache.fetch(wrong, CountedSource(folder / entry.name))
    assert held(tmp_path / "cache") == 0
    with pytest.raises(DataError, match="cache_bytes"):
        ShardCache(tmp_path / "cache", 10).fetch(entry, CountedSource(folder / entry.name))


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_shard_that_disappears_is_named(store: RemotePath, tmp_path: Path, mode: str) -> None:
    remote = ShardSet(
        str(store), remote=RemoteReading(mode=mode, cache_dir=tmp_path / "cache", attempts=1)
    )
    remote.labels(2)
    (store / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar.*does not exist"):
        remote.read(2, 0)


def test_shards_are_fetched_ahead_in_the_order_of_the_sampler() -> None:
    plan = [[Address(0, shard, row) for row in range(3)] for shard in (4, 2, 2, 7)]
    fetched: list[int] = []
    done = threading.Event()

    def fetch(shard: int) -> None:
        fetched.append(shard)
        if shard == 7:
            done.set()

    found = []
    for batch in ShardPrefetcher(plan, fetch):
        found.append(batch)
        if len(found) == len(plan):
            assert done.wait(5)
    assert found == plan
    assert fetched == [4, 2, 7]
