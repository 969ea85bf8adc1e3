import os
import pickle
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep.format.manifest import ManifestError
from simmim.data.datasets import shards as reading
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import ShardSet
from simmim.data.order.source import DataError
from tests.simmim.data.conftest import WriteShards, random_images


def everything(shards: ShardSet) -> list[tuple[str, bytes, int | None]]:
    samples = [
        shards.read(shard, sample)
        for shard, size in enumerate(shards.sizes)
        for sample in range(size)
    ]
    return [(sample.key, sample.image, sample.label) for sample in samples]


def test_random_access_reads_what_a_stream_reads(write_shards: WriteShards) -> None:
    folder = write_shards([5, 3, 7], ("cat", "dog"))
    shards = ShardSet(folder)
    expected = []
    for entry in shards.manifest.shards:
        with (folder / entry.name).open("rb") as file:
            files = tar_file_expander([{"url": entry.name, "stream": file}])
            samples = list(group_by_keys(files))
        expected += [(item["__key__"], item["png"], int(item["cls"])) for item in samples]
    assert everything(shards) == expected
    assert shards.sizes == [5, 3, 7]
    assert len(shards) == shards.samples == 15
    assert shards.read(1, 0).name == "shard-000001/001000000"


def open_files() -> int:
    return psutil.Process().num_fds()


def test_sets_without_labels(write_shards: WriteShards) -> None:
    shards = ShardSet(write_shards([2]))
    assert shards.read(0, 1).label is None
    assert shards.labels(0).tolist() == [-1, -1]
    with pytest.raises(ValueError, match="a folder of its own"):
        shards.require_labels()


def test_labels_are_enough_for_two_classes(write_shards: WriteShards) -> None:
    shards = ShardSet(write_shards([4], ("cat", "dog")))
    shards.require_labels()
    assert shards.classes == ("cat", "dog")
    assert shards.labels(0).tolist() == [0, 1, 0, 1]


def test_the_last_shards_are_held_out(write_shards: WriteShards) -> None:
    shards = ShardSet(write_shards([2, 3, 4, 5]))
    training, validation = shards.split(1)
    assert (training.sizes, validation.sizes) == ([2, 3, 4], [5])
    assert everything(training) + everything(validation) == everything(shards)
    training, validation = shards.split(0)
    assert (training.sizes, validation.sizes) == ([2, 3, 4, 5], [])
    for count in (4, 5, -1):
        with pytest.raises(ValueError, match="set it to 3 or less"):
            shards.split(count)


def test_some_of_the_shards(write_shards: WriteShards) -> None:
    folder = write_shards([2, 3, 4])
    assert ShardSet(folder, shards=[2, 0]).sizes == [4, 2]
    assert ShardSet(folder, shards=slice(1, None)).sizes == [3, 4]
    assert ShardSet(folder, shards=[2]).read(0, 1).shard_name == "shard-000002"
    with pytest.raises(ValueError, match="no shard 3"):
        ShardSet(folder, shards=[3])


def test_a_share_of_each_class(write_shards: WriteShards) -> None:
    shards = ShardSet(write_shards([30, 30, 40], ("a", "b", "c", "d")))
    tenth, half = shards.share(0.12, seed=1), shards.share(0.5, seed=1)
    counts = np.bincount(np.concatenate([tenth.labels(shard) for shard in range(3)]))
    assert counts.tolist() == [3, 3, 3, 3]
    assert len(half) == 48
    assert set(everything(tenth)) < set(everything(half)) < set(everything(shards))
    assert everything(shards.share(0.12, seed=1)) == everything(tenth)
    assert everything(shards.share(0.12, seed=2)) != everything(tenth)
    assert everything(shards.share(1.0, seed=1)) == everything(shards)
    assert len(shards.share(0.001, seed=1)) == 4
    assert set(everything(half.share(0.5, seed=3))) < set(everything(half))
    assert half.split(1)[1].sizes == half.sizes[-1:]
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            shards.share(share, seed=0)


def test_few_shards_stay_open(write_shards: WriteShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "OPEN_SHARDS", 2)
    shards = ShardSet(write_shards([1] * 8))
    before = open_files()
    first = everything(shards)
    assert open_files() == before + 2
    assert everything(shards) == first
    copy = pickle.loads(pickle.dumps(shards))
    assert everything(copy) == first
    del shards, copy
    assert open_files() == before


def test_missing_or_truncated_shards_are_named(write_shards: WriteShards) -> None:
    folder = write_shards([3, 3])
    twice = RemoteReading(attempts=2)
    shards = ShardSet(folder, remote=twice)
    (folder / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar.*after 2 attempts"):
        shards.read(0, 0)
    shards.read(1, 0)
    os.truncate(folder / "shard-000001.tar", 1024)
    with pytest.raises(
        DataError, match=r"shard-000001\.tar has 1,024 bytes and the manifest says 10,240"
    ):
        shards.read(1, 2)
    with pytest.raises(DataError, match=r"shard-000001\.tar has 1,024 bytes"):
        ShardSet(folder, remote=twice).read(1, 0)


@pytest.mark.parametrize("fault", ["gone", "cut off", "index"])
@pytest.mark.parametrize("opened", [False, True])
def test_reads_are_retried_until_a_shard_comes_back(
    write_shards: WriteShards, fault: str, opened: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards([3])
    expected = ShardSet(folder).read(0, 2)
    shards = ShardSet(folder)
    if opened:
        shards.read(0, 0)
    path = folder / ("shard-000000.npy" if fault == "index" else "shard-000000.tar")
    content = path.read_bytes()
    if fault == "cut off":
        os.truncate(path, 1024)
    else:
        path.unlink()

    def bring_back() -> None:
        aside = path.with_name("copy")
        aside.write_bytes(content)
        aside.replace(path)

    later = threading.Timer(1.0, bring_back)
    later.start()
    assert shards.read(0, 2) == expected
    later.join()
    waited = not opened or fault == "cut off"  # an open file outlives its name
    assert ("retrying in" in capsys.readouterr().err) == waited


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"format": "simmim-shards"}'])
def test_invalid_manifests_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        ShardSet(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        ShardSet(tmp_path)


def test_random_images_differ() -> None:
    assert len(set(random_images(20))) == 20


def test_some_classes_alone(write_shards: WriteShards) -> None:
    shards = ShardSet(write_shards([10, 6], ("a", "b", "c")))
    chosen = shards.only_classes(["c", "a"])
    assert chosen.classes == ("a", "c")
    assert chosen.sizes == [7, 4]
    assert chosen.labels(0).tolist() == [0, 1, 0, 1, 0, 1, 0]
    for shard, size in enumerate(chosen.sizes):
        read = [chosen.read(shard, sample).label for sample in range(size)]
        assert read == chosen.labels(shard).tolist()
    assert set(everything(chosen.share(0.5, seed=1))) < set(everything(chosen))
    assert chosen.only_classes(["c"]).labels(1).tolist() == [0, 0]
    assert chosen.digest != shards.digest
    assert shards.only_classes(["a", "b", "c"]).classes == shards.classes
    with pytest.raises(ValueError, match=r"no class d.*a, b, c"):
        shards.only_classes(["a", "d"])
    with pytest.raises(ValueError, match="choose from a, c"):
        chosen.only_classes(["b"])
