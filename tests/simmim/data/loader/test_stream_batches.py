"""Batches of a stream: at most once an epoch on any ranks and workers; mixed, and damaged."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from simmim.data.datasets.mixture import StreamedShards, order_of
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import Batch
from simmim.data.loader.sampler import TrainingSampler
from simmim.data.loader.stream_batches import StreamBatches
from simmim.data.order.order import MixedOrder
from simmim.data.order.source import DataError
from simmim.data.transforms.image_transforms import TrainTransform
from tests.simmim.data.conftest import WriteShards, crop, random_images
from tests.simmim.data.datasets.test_tar_stream import add, opened, write_tars

Names = list[tuple[int, str]]


def streamed(tars: Path, samples: int, indexed: Sequence[ShardSet] = ()) -> StreamedShards:
    return StreamedShards(indexed, [1.0] * len(indexed), opened(tars, samples=samples))


def start(
    shards: StreamedShards,
    *,
    stop: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    begin: int = 0,
    batch_size: int = 8,
    accumulation: int = 1,
    bad_samples: BadSamples | None = None,
) -> StreamBatches:
    return StreamBatches(
        shards,
        TrainTransform(data=crop(8), seed=1),
        TrainingSampler(
            order=order_of(shards, seed=1, slots=1),
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world=world,
            start=begin,
            stop=stop,
        ),
        seed=1,
        workers=workers,
        bad_samples=bad_samples,
    )


def named(shards: StreamedShards, batch: Batch) -> Names:
    return [(began, shards.name(shard, row)) for began, shard, row in batch.addresses.tolist()]


def together(shards: StreamedShards, *, world: int, stop: int, workers: int) -> list[Names]:
    """Return the global batches of ranks that end their epochs together, as in training."""
    ranks = [
        start(shards, rank=rank, world=world, stop=stop, workers=workers) for rank in range(world)
    ]
    iterators = [iter(rank) for rank in ranks]
    steps = []
    while ranks[0].position < stop:
        if max([rank.is_short() for rank in ranks]):
            for rank in ranks:
                rank.begin_again()
        steps.append([pair for one in iterators for pair in named(shards, next(one))])
    return steps


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (2, 0), (4, 1)])
@pytest.mark.parametrize("sizes", [[24, 24, 24], [72], [40, 3, 20, 9], [9] * 8])
def test_each_sample_at_most_once_an_epoch(
    tmp_path: Path, sizes: list[int], world: int, workers: int
) -> None:
    shards = streamed(write_tars(tmp_path / "tars", sizes), samples=72)
    steps = together(shards, world=world, stop=25 * 8, workers=workers)
    assert [len(step) for step in steps] == [8] * 25
    seen = Counter(pair for step in steps for pair in step)
    assert set(seen.values()) == {1}
    passes = Counter(began for began, _ in seen)
    assert list(passes)[:1] == [0]
    # Micro-batches are whole, and parts of equal length have about equally many samples.
    assert min(list(passes.values())[:-1]) >= 72 // 2
    orders = [[name for began, name in seen if began == one] for one in passes]
    assert orders[0] != orders[1][: len(orders[0])]


def test_a_stated_epoch_ends_where_it_says(tmp_path: Path) -> None:
    shards = streamed(write_tars(tmp_path / "tars", [40, 40]), samples=32)
    steps = together(shards, world=2, stop=96, workers=0)
    assert [{began for began, _ in step} for step in steps] == [
        {32 * (step // 4)} for step in range(12)
    ]
    seen = Counter(pair for step in steps for pair in step)
    assert set(seen.values()) == {1}


def test_the_same_start_is_the_same_and_a_resumed_run_shuffles_anew(tmp_path: Path) -> None:
    shards = streamed(write_tars(tmp_path / "tars", [40, 40]), samples=80)

    def drawn(begin: int, workers: int = 2) -> list[Names]:
        return [named(shards, one) for one in start(shards, begin=begin, stop=64, workers=workers)]

    whole = drawn(0)
    assert drawn(0) == whole
    resumed = drawn(32)
    assert len(resumed) == len(whole) - 4
    assert resumed != whole[4:]
    assert {began for step in resumed for began, _ in step} == {32}


def test_the_augmentation_belongs_to_pass_and_sample(tmp_path: Path) -> None:
    shards = streamed(write_tars(tmp_path / "tars", [16]), samples=16)

    def images(world: int) -> dict[tuple[int, str], torch.Tensor]:
        return {
            name: image
            for rank in range(world)
            for batch in start(shards, rank=rank, world=world, stop=8)
            for name, image in zip(named(shards, batch), batch.images, strict=True)
        }

    one, two = images(1), images(2)
    common = one.keys() & two.keys()
    assert len(common) >= 2
    assert all(torch.equal(one[name], two[name]) for name in common)


def test_indexed_sets_keep_their_exact_order_in_a_mixture(
    tmp_path: Path, write_shards: WriteShards
) -> None:
    indexed = ShardSet(write_shards([20, 20]))
    shards = streamed(write_tars(tmp_path / "tars", [30, 30]), samples=60, indexed=[indexed])
    steps = together(shards, world=2, stop=160, workers=2)
    alone = together(shards, world=1, stop=160, workers=0)
    order = MixedOrder([[20, 20], [60]], [1.0, 1.0], seed=1, slots=1, stream=True)
    drawn = [address for step in range(20) for address in order.batch(step * 8, 8)]
    wanted = [(one.epoch, indexed.name(one.shard, one.sample)) for one in drawn if one.shard < 2]
    for found in (steps, alone):
        pairs = [pair for step in found for pair in step]
        of_stream = [pair for pair in pairs if "sample" in pair[1]]
        assert [pair for pair in pairs if pair not in of_stream] == wanted
        assert len(of_stream) == 80
        assert set(Counter(of_stream).values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_counted_named_and_limited(tmp_path: Path, workers: int) -> None:
    (picture,) = random_images(1)
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(4):
        members = {f"{row}.png": picture for row in range(8)}
        add(tars / f"{number}.tar", {"bad.png": picture[:40], **members, "text.txt": b"only text"})
    account = BadSamples()
    account.write_to(tmp_path / "bad.jsonl")
    shards = streamed(tars, samples=32)
    for _ in start(shards, stop=32, workers=workers, bad_samples=account):
        pass
    assert 3 <= account.bad <= 4
    assert account.asked == 32 + account.bad
    assert account.without_image[".txt"] >= 3
    lines = (tmp_path / "bad.jsonl").read_text()
    assert lines.count('"bad"') == account.bad
    assert lines.count("no image") == 3  # of each kind, the first few are named
    with pytest.raises(DataError, match=r"more than\s+data\.max_bad_share"):
        for _ in start(shards, stop=32, workers=workers, bad_samples=BadSamples(0.001)):
            pass


def test_too_few_samples_for_a_batch_and_missing_tars_are_errors(tmp_path: Path) -> None:
    shards = streamed(write_tars(tmp_path / "tars", [7]), samples=70)
    with pytest.raises(DataError, match=r"fewer than\s+the 8 samples of a micro-batch"):
        next(iter(start(shards, stop=8)))
    (tmp_path / "tars" / "000.tar").unlink()
    with pytest.raises(DataError, match=r"^data\.stream: tar \S+ cannot be opened"):
        next(iter(start(shards, stop=8, batch_size=4)))


def test_accumulated_batches_end_together(tmp_path: Path) -> None:
    shards = streamed(write_tars(tmp_path / "tars", [21]), samples=21)
    batches = list(start(shards, stop=48, accumulation=2))
    assert [len(batch) for batch in batches] == [4] * 12
    seen = Counter(pair for batch in batches for pair in named(shards, batch))
    assert set(seen.values()) == {1}
