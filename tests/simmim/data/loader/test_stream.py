"""The global stream: independent of ranks, workers, batch sizes and restarts; and well mixed."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batches import TrainingBatches
from simmim.data.loader.sampler import TrainingSampler
from simmim.data.order import order as order_module
from simmim.data.order.order import Address, SampleOrder
from tests.simmim.data.conftest import WriteShards
from tests.simmim.data.loader.test_batches import TRAIN, equal, joined


def global_batches(
    order: SampleOrder, *, batch_size: int, world: int, accumulation: int, start: int, stop: int
) -> list[list[Address]]:
    """What all ranks together take at each step, read off their plans."""
    plans = [
        list(
            TrainingSampler(
                order=order,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world=world,
                start=start,
                stop=stop,
            )
        )
        for rank in range(world)
    ]
    return [
        list(chain(*chain(*(plan[step : step + accumulation] for plan in plans))))
        for step in range(0, len(plans[0]), accumulation)
    ]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), in_blocks=st.booleans())
def test_nothing_but_seed_and_manifest_changes_the_stream(
    data: st.DataObject, in_blocks: bool
) -> None:
    world = data.draw(st.integers(1, 16))
    slots = world * data.draw(st.integers(1, 3))
    turns, accumulation = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3]))
    sizes = data.draw(
        st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(lambda s: sum(s) >= slots)
    )
    seed = data.draw(st.integers(0, 5))
    with pytest.MonkeyPatch.context() as patch:
        if in_blocks:
            patch.setattr(order_module, "WHOLE_SHUFFLE_LIMIT", 0)
            patch.setattr(order_module, "BLOCK_SAMPLES", data.draw(st.integers(1, 9)))
        order = SampleOrder(sizes, seed=seed, slots=slots)
        batch_size = slots * turns * accumulation
        steps = -(-3 * order.samples_per_epoch // batch_size)
        stop = steps * batch_size
        alone = {"batch_size": batch_size, "world": 1, "accumulation": 1, "stop": stop}
        whole = global_batches(order, start=0, **alone)
        fresh = SampleOrder(sizes, seed=seed, slots=slots)
        cut = data.draw(st.integers(0, steps))
        resumed = global_batches(
            fresh,
            batch_size=batch_size,
            world=world,
            accumulation=accumulation,
            start=cut * batch_size,
            stop=stop,
        )
    assert resumed == whole[cut:]
    seen = list(chain(*whole))
    assert len(seen) == len(set(seen)) == stop
    whole_epochs = [address for address in seen if address.epoch < 3]
    assert len(whole_epochs) == 3 * order.samples_per_epoch


# torch warns of more workers than cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_workers_change_nothing(write_shards: WriteShards, workers: int) -> None:
    shards = ShardSet(write_shards([11, 9, 14], ("a", "b")))
    order = SampleOrder(shards.sizes, seed=1, slots=4)

    def batches(workers: int) -> TrainingBatches:
        return TrainingBatches(
            shards, order, TRAIN, batch_size=4, start_position=8, end_position=80, workers=workers
        )

    assert equal(joined(batches(workers)), joined(batches(0)))


def neighbour_distances(order: SampleOrder) -> np.ndarray:
    """How far apart in the stream of an epoch samples land that are neighbours in their shard."""
    places = np.full((len(order.shard_sizes), int(order.shard_sizes.max())), -1)
    # A batch that is the whole epoch lists slot after slot; the stream takes from them in turn.
    addresses = order.batch(0, order.samples_per_epoch)
    length = order.samples_per_epoch // order.slots
    for number, (_, shard, sample) in enumerate(addresses):
        slot, turn = divmod(number, length)
        places[shard, sample] = turn * order.slots + slot
    both = (places[:, 1:] >= 0) & (places[:, :-1] >= 0)
    return np.abs(np.diff(places, axis=1))[both]


def test_neighbours_of_the_source_land_far_apart() -> None:
    """An even shuffle puts them a third of the epoch apart on average, and 29% at the median."""
    small = neighbour_distances(SampleOrder([1000] * 60, seed=0))  # one shuffle of everything
    assert abs(small.mean() / 60_000 - 1 / 3) < 0.01
    large = SampleOrder([5000] * 60, seed=0)  # shards are shuffled, and samples within slots
    distances = neighbour_distances(large)
    assert abs(distances.mean() / 300_000 - 1 / 3) < 0.01
    assert abs(np.median(distances) / 300_000 - 0.29) < 0.01
    assert np.mean(distances < 256) < 0.005
    shards = {address.shard for address in large.batch(0, 256)}
    assert len(shards) > 40


def test_neighbours_stay_within_a_block_of_a_set_too_large_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks bound the distance: a third of a block of each slot, over all slots."""
    monkeypatch.setattr(order_module, "BLOCK_SAMPLES", 512)
    distances = neighbour_distances(SampleOrder([5000] * 60, seed=0, slots=64))
    assert 0.25 * 512 * 64 < distances.mean() < 0.45 * 512 * 64
    assert np.mean(distances < 256) < 0.03
