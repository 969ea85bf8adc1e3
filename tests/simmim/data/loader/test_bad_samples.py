import io
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.bad_samples import BadSample, BadSamples
from simmim.data.loader.batch import Batch, BatchDataset
from simmim.data.loader.batches import TrainingBatches, evaluation_batches
from simmim.data.order.order import Address, SampleOrder
from simmim.data.order.source import DataError
from simmim.data.transforms.image_transforms import EvalTransform, TrainTransform
from tests.simmim.data.conftest import WriteShards, crop, random_images
from tests.simmim.data.loader.test_batches import equal, joined
from tests.simmim.data.transforms.test_decoding import damaged_in_the_middle, jpeg, saved
from tests.simmim.data.transforms.test_image_transforms import DrawMask
from tests.simmim.forked import finish

TRAIN = TrainTransform(data=crop(8), seed=3, mask=DrawMask((2, 2)))
BAD = {2: b"no image at all", 11: b"\xff\xd8\xff", 17: random_images(1)[0][:40]}


@pytest.fixture
def shards(write_shards: WriteShards) -> ShardSet:
    """20 samples in two shards, three of them bad."""
    images = random_images(20)
    for place, data in BAD.items():
        images[place] = data
    return ShardSet(write_shards([10, 10], ("a", "b"), images))


def training(shards: ShardSet, bad_samples: BadSamples, **options: int) -> TrainingBatches:
    order = SampleOrder(shards.sizes, seed=1, slots=4)
    chosen = {"batch_size": 4, "start_position": 0, "end_position": 60} | options
    return TrainingBatches(shards, order, TRAIN, bad_samples=bad_samples, **chosen)


def test_training_replaces_a_bad_sample_by_another_of_its_shard(shards: ShardSet) -> None:
    account = BadSamples()
    whole = joined(training(shards, account))
    assert whole.images.shape == (60, 3, 8, 8)
    assert (account.asked, account.bad, account.repaired) == (60, 9, 0)
    assert {(found.kind, found.shard, found.key) for found in whole.bad} == {
        ("replaced", "shard-000000", "000000002"),
        ("replaced", "shard-000001", "001000001"),
        ("replaced", "shard-000001", "001000007"),
    }
    order = SampleOrder(shards.sizes, seed=1, slots=4)
    asked = [address for start in range(0, 60, 4) for address in order.batch(start, 4)]
    # What took the place is told, and looks as that sample itself does in that epoch.
    good = BatchDataset(shards, TRAIN, replacing=True)
    for row, wanted in enumerate(asked):
        address = Address(*whole.addresses[row].tolist())
        assert 10 * address.shard + address.sample not in BAD
        assert address.shard == wanted.shard
        assert (address == wanted) == (10 * wanted.shard + wanted.sample not in BAD)
        assert torch.equal(good[[address]].images[0], whole.images[row])


def test_the_replacement_is_a_function_of_the_address(shards: ShardSet) -> None:
    whole = joined(training(shards, BadSamples()))
    assert equal(whole, joined(training(shards, BadSamples(), workers=2)))
    resumed = joined(training(shards, BadSamples(), start_position=20))
    assert torch.equal(whole.images[20:], resumed.images)
    ranks = [list(training(shards, BadSamples(), rank=rank, world=2)) for rank in range(2)]
    assert equal(whole, joined(chain(*zip(*ranks, strict=True))))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_skips_bad_samples(shards: ShardSet, batch_size: int) -> None:
    account = BadSamples()
    stream = evaluation_batches(
        shards, EvalTransform(size=(8, 8)), batch_size=batch_size, bad_samples=account
    )
    whole = joined(stream)
    seen = [10 * shard + sample for _, shard, sample in whole.addresses.tolist()]
    assert seen == [place for place in range(20) if place not in BAD]
    assert whole.labels is not None
    assert whole.labels.tolist() == [place % 2 for place in seen]
    assert (account.asked, account.bad) == (20, 3)
    assert account.summary().startswith("3 of 20 samples")
    assert "shard-000000/000000002" in account.summary()


def test_a_shard_of_only_bad_samples_is_refused(write_shards: WriteShards) -> None:
    shards = ShardSet(write_shards([4, 4], images=random_images(4) + [b"bad"] * 4))
    with pytest.raises(DataError, match=r"is damaged.*replacements") as caught:
        list(training(shards, BadSamples(max_share=1)))
    assert "shard-000001" in str(caught.value)


def test_repaired_samples_are_used_and_named(write_shards: WriteShards) -> None:
    pytest.importorskip("simplejpeg")
    images = [jpeg(), damaged_in_the_middle(), jpeg(), jpeg()]
    shards = ShardSet(write_shards([4], images=images, extension="jpg"))
    account = BadSamples(max_share=0)
    whole = joined(training(shards, account, end_position=8))
    assert [found.kind for found in whole.bad] == ["repaired"] * 2
    assert (account.asked, account.bad, account.repaired) == (8, 0, 2)


def problem(place: int, kind: str = "replaced") -> BadSample:
    return BadSample(kind=kind, folder="f", shard="s", key=str(place), reason=f"for {place}")


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    account = BadSamples(max_share=0.01)
    account.write_to(tmp_path / "bad.jsonl")
    for place in range(10):  # 1% of the least that is judged
        account.record(1, [problem(place)])
    with pytest.raises(DataError, match=r"11 of 11 samples .*sample s/10 in f: for 10.*bad\.jsonl"):
        account.record(1, [problem(10)])
    account = BadSamples(max_share=0.01)
    account.record(5000, [problem(place) for place in range(50)])
    with pytest.raises(DataError, match="51 of 5001"):
        account.record(1, [problem(50)])
    account.record(1000, [])


def names(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_each_bad_sample_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    first, second = BadSamples(), BadSamples()
    for account in (first, second):
        account.write_to(path)
    first.record(10, [problem(1), problem(2), problem(1)])
    second.record(10, [problem(2), problem(3)])
    first.record(10, [problem(3), problem(4), problem(3, "skipped")])
    assert names(path) == ["1", "2", "3", "4", "3"]
    line = json.loads(path.read_text().splitlines()[0])
    assert line == vars(problem(1))
    resumed = BadSamples()
    resumed.write_to(path)
    resumed.record(10, [problem(place) for place in (4, 5, 1)])
    assert names(path)[5:] == ["5"]
    with path.open("ab") as file:
        file.write(
            b"no json\n" + b"[" * 100_000 + b'\n{"kind": "replaced", "fo'
        )  # edited, and killed
    resumed.record(10, [problem(6)])
    after = path.read_text().splitlines()
    assert json.loads(after[-1])["key"] == "6"


WRITER = """
import sys
from pathlib import Path
from PIL import Image

from simmim.data.loader.bad_samples import BadSample, BadSamples
account = BadSamples(max_share=1)
account.write_to(Path(sys.argv[1]))
for place in range(60):
    found = BadSample(kind="replaced", folder="f", shard="s", key=str(place), reason="r" * 300)
    account.record(1, [found])
"""


def test_processes_do_not_list_the_same_sample_twice(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    finish(["-c", WRITER, str(path)], tmp_path / "log", ranks=3)
    assert sorted(names(path), key=int) == [str(place) for place in range(60)]


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def test_batches_of_mixed_types_are_refused(write_shards: WriteShards) -> None:
    arrays = [saved(np.ones((9, 9, 5), dtype=kind)) for kind in ("uint8", "float32")]
    shards = ShardSet(write_shards([2], images=arrays, extension="npy"))
    transform = EvalTransform(size=(8, 8), channels=5)
    listed = r"float32 \(such as \S+/0*1\), uint8 \(such as \S+/0*0\)\. Put"
    with pytest.raises(DataError, match=listed):
        list(evaluation_batches(shards, transform, batch_size=2))
    batches: list[Batch] = list(evaluation_batches(shards, transform, batch_size=1, workers=1))
    assert [batch.images.dtype for batch in batches] == [torch.uint8, torch.float32]
    assert [batch.images.shape for batch in batches] == [(1, 5, 8, 8)] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_of_8_and_16_bits_share_a_batch(write_shards: WriteShards, workers: int) -> None:
    deep = np.full((9, 9), 300, dtype=np.uint16)
    images = [png(np.full((9, 9), 200, dtype=np.uint8)), png(deep)]
    shards = ShardSet(write_shards([2], images=images, extension="png"))
    transform = EvalTransform(size=(8, 8), channels=1)
    (batch,) = evaluation_batches(shards, transform, batch_size=2, workers=workers)
    assert batch.images.dtype == torch.uint16
    assert batch.images.to(torch.int32).amax(dim=(1, 2, 3)).tolist() == [200 * 257, 300]


def test_other_channels_are_not_a_matter_of_damage(write_shards: WriteShards) -> None:
    arrays = [saved(np.ones((9, 9, 5), dtype=np.uint8))] * 20
    shards = ShardSet(write_shards([20], images=arrays, extension="npy"))
    with pytest.raises(DataError, match=r"Set encoder\.in_channels") as caught:
        list(evaluation_batches(shards, EvalTransform(size=(8, 8), channels=3), batch_size=20))
    assert "again" not in str(caught.value)
