from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim.data.datasets.mixture import MixedShards, order_of
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batches import TrainingBatches
from simmim.data.order.order import Address, MixedOrder, SampleOrder, dataset_pattern
from tests.simmim.data.conftest import WriteShards, random_images
from tests.simmim.data.loader.test_batches import TRAIN, equal, joined

SETS = [[30, 20, 14], [9, 40], [500, 300, 200]]
WEIGHTS = [0.5, 0.2, 0.3]


def mixed(slots: int = 8, seed: int = 1) -> MixedOrder:
    return MixedOrder(SETS, WEIGHTS, seed=seed, slots=slots)


def set_of(address: Address) -> int:
    return 0 if address.shard < 3 else 1 if address.shard < 5 else 2


@pytest.mark.parametrize("slots", [1, 8, 64 // 2])
def test_each_batch_holds_each_set_in_proportion(slots: int) -> None:
    order = mixed(slots)
    total: Counter[int] = Counter()
    for position in range(0, 64 * 200, 64):
        counts = Counter(map(set_of, order.batch(position, 64)))
        total += counts
        assert all(
            abs(counts[number] - 64 * weight) <= 2 for number, weight in enumerate(WEIGHTS)
        ), counts
    for number, weight in enumerate(WEIGHTS):
        assert abs(total[number] / total.total() - weight) < 0.001


def test_each_set_is_traversed_in_its_own_order() -> None:
    slots = 8
    order = mixed(slots)
    addresses = list(chain(*(order.batch(position, slots) for position in range(0, 16_000, slots))))
    for number, first in enumerate([0, 3, 5]):
        alone = SampleOrder(SETS[number], seed=1 + number, slots=slots)
        for slot in range(slots):
            mine = [address for address in addresses[slot::slots] if set_of(address) == number]
            expected = alone.slot_addresses(slot, np.arange(len(mine)))
            assert mine == [
                Address(epoch, first + shard, sample) for epoch, shard, sample in expected
            ]
            assert len(mine) > 100


@settings(max_examples=60, deadline=None)
@given(data=st.data(), slots=st.sampled_from([1, 2, 4, 6, 16]))
def test_cursor_and_ranks_change_nothing_and_no_sample_comes_twice_an_epoch(
    data: st.DataObject, slots: int
) -> None:
    sizes = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda s: sum(s) >= slots)
    sets = data.draw(st.lists(sizes, min_size=1, max_size=4))
    weights = [data.draw(st.floats(0.05, 5)) for _ in sets]
    seed = data.draw(st.integers(0, 3))
    order = MixedOrder(sets, weights, seed=seed, slots=slots)
    batch_size = slots * data.draw(st.integers(1, 4))
    cursor = slots * data.draw(st.integers(0, 30_000))
    stop = cursor + 12 * batch_size
    batches = [order.batch(position, batch_size) for position in range(cursor, stop, batch_size)]
    seen = list(chain(*batches))
    assert len(seen) == len(set(seen)) == 12 * batch_size
    assert all(0 <= sample < order.shard_sizes[shard] for _, shard, sample in seen)
    fresh = MixedOrder(sets, weights, seed=seed, slots=slots)
    middle = cursor + 5 * batch_size
    for world in (world for world in range(1, 17) if batch_size % world == 0):
        parts = [fresh.batch(middle, batch_size, rank, world) for rank in range(world)]
        assert list(chain(*parts)) == batches[5]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), slots=st.sampled_from([2, 4, 6]))
def test_small_sets_in_a_mixture_with_large_ones_leave_nothing_out(
    data: st.DataObject, slots: int
) -> None:
    small = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    weights = [data.draw(st.floats(0.2, 5)), 1.0, data.draw(st.floats(0.2, 5))]
    sets = [small, [40, 30], [7]]
    order = MixedOrder(sets, weights, seed=2, slots=(1, slots, 1))
    batch_size = slots * data.draw(st.integers(1, 4))
    addresses = [
        address
        for position in range(0, 900 * slots, batch_size)
        for address in order.batch(position, batch_size)
    ]
    firsts = [0, len(small), len(small) + 2]
    for number in (0, 2):
        alone = SampleOrder(sets[number], seed=2 + number, slots=1)
        shards = range(firsts[number], firsts[number] + len(sets[number]))
        mine = [address for address in addresses if address.shard in shards]
        expected = alone.slot_addresses(0, np.arange(len(mine)))
        # Within a batch the turns of a slot follow each other, so the order differs there.
        assert set(mine) == {Address(e, firsts[number] + shard, row) for e, shard, row in expected}
        assert len(set(mine)) == len(mine) > alone.samples
    for world in (world for world in range(1, 9) if batch_size % world == 0):
        parts = [order.batch(5 * batch_size, batch_size, rank, world) for rank in range(world)]
        assert list(chain(*parts)) == order.batch(5 * batch_size, batch_size)
    with pytest.raises(ValueError, match="one number per set"):
        MixedOrder(sets, weights, seed=2, slots=(1, 2))


def test_patterns_spread_evenly() -> None:
    for weights in ([1, 1], [0.9, 0.1], [3, 2, 1, 0.01]):
        found = dataset_pattern(weights, 10_007)
        assert len(found) == 10_007
        for number, weight in enumerate(weights):
            share = weight / sum(weights)
            running = np.cumsum(found == number) - share * np.arange(1, 10_008)
            assert np.abs(running).max() <= len(weights)
    with pytest.raises(ValueError, match="never be drawn"):
        dataset_pattern([1, 1e-6], 10_007)


def test_an_epoch_counts_the_samples_of_all_sets() -> None:
    assert mixed(8).samples_per_epoch == 64 + 48 + 1000
    with pytest.raises(ValueError, match="cannot fill 100 slots"):
        mixed(100)
    with pytest.raises(ValueError, match="not a multiple of the 8 slots"):
        mixed(8).batch(0, 12)
    with pytest.raises(ValueError, match="cursor 4"):
        mixed(8).batch(4, 8)


@pytest.fixture
def sets(write_shards: WriteShards) -> list[ShardSet]:
    folders = [
        write_shards(sizes, ("a", "b"), random_images(sum(sizes), seed), name=f"set{seed}")
        for seed, sizes in enumerate([[5, 6, 3], [9, 8]])
    ]
    return [ShardSet(folder) for folder in folders]


def test_a_mixture_reads_as_one_set(sets: list[ShardSet]) -> None:
    both = MixedShards(sets, [2, 1])
    assert both.sizes == [5, 6, 3, 9, 8]
    assert (both.samples, len(both), both.classes) == (31, 31, ("a", "b"))
    assert both.read(1, 2) == sets[0].read(1, 2)
    assert both.read(3, 8) == sets[1].read(0, 8)
    assert both.folder_of(2).endswith("set0")
    assert both.folder_of(3).endswith("set1")
    assert both.labels(4).tolist() == sets[1].labels(1).tolist()
    training, validation = both.split(1)
    assert (training.sizes, validation.sizes) == ([5, 6, 9], [3, 8])
    assert 0 < training.share(0.5, seed=0).samples < training.samples
    assert both.digest != MixedShards(sets, [1, 1]).digest
    assert both.only_classes(["b"]).sizes == [2, 3, 2, 4, 4]
    both.require_labels()
    with pytest.raises(ValueError, match="weight above 0"):
        MixedShards(sets, [1, 0])


def test_sets_of_different_classes_count_as_unlabelled(
    sets: list[ShardSet], write_shards: WriteShards
) -> None:
    other = ShardSet(write_shards([4], ("a", "c"), name="other"))
    both = MixedShards([sets[0], other], [1, 1])
    assert both.classes == ()
    assert both.labels(0).tolist() == [-1] * 5
    with pytest.raises(ValueError, match="different classes"):
        both.require_labels()


def test_batches_of_a_mixture_are_the_same_with_workers_ranks_and_restarts(
    sets: list[ShardSet],
) -> None:
    both = MixedShards(sets, [2, 1])

    def batches(**options: int) -> TrainingBatches:
        chosen = {"batch_size": 8, "start_position": 0, "end_position": 80} | options
        return TrainingBatches(both, order_of(both, seed=3, slots=4), TRAIN, **chosen)

    whole = joined(batches())
    assert len({tuple(row) for row in whole.addresses.tolist()}) == 80
    assert equal(whole, joined(batches(workers=2)))
    ranks = [list(batches(rank=rank, world=2)) for rank in range(2)]
    assert equal(whole, joined(chain(*zip(*ranks, strict=True))))
    first, rest = joined(batches(end_position=24)), joined(batches(start_position=24))
    assert np.array_equal(whole.images, np.concatenate([first.images, rest.images]))
