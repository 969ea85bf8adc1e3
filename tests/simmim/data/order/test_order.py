from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim.data.order import order as order_module
from simmim.data.order.order import (
    WHOLE_SHUFFLE_LIMIT,
    Address,
    MixedOrder,
    SampleOrder,
    choose_slots,
    describe_order,
    needless_slots,
    slots_for,
)

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@pytest.fixture(params=["whole shuffle", "blocks"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of an epoch, the one for large sets made small enough to count."""
    if request.param == "blocks":
        monkeypatch.setattr(order_module, "WHOLE_SHUFFLE_LIMIT", 0)
        monkeypatch.setattr(order_module, "BLOCK_SAMPLES", 7)
    return request.param


def each_form(test: Callable[[], None]) -> Callable[..., None]:
    """Run a property in both forms; hypothesis and function fixtures do not mix."""

    def run(*, form: str) -> None:
        test()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def draw_order(data: st.DataObject, slots: int) -> SampleOrder:
    sizes = data.draw(shard_sizes.filter(lambda sizes: sum(sizes) >= slots))
    return SampleOrder(sizes, seed=data.draw(st.integers(0, 3)), slots=slots)


def stream(order: SampleOrder, start: int, stop: int, step: int) -> list[list[Address]]:
    return [order.batch(position, step) for position in range(start, stop, step)]


@each_form
@settings(max_examples=60, deadline=None)
@given(data=st.data(), slots=st.sampled_from([1, 2, 4, 6, 8]))
def test_an_epoch_visits_each_sample_at_most_once_and_nearly_all(
    data: st.DataObject, slots: int
) -> None:
    order = draw_order(data, slots)
    epochs = 3
    batches = stream(order, 0, epochs * order.samples_per_epoch, slots)
    for epoch in range(epochs):
        seen = [a[1:] for batch in batches for a in batch if a.epoch == epoch]
        assert len(seen) == len(set(seen)) == order.samples_per_epoch
        assert order.samples - order.samples_per_epoch < slots
        assert all(0 <= sample < order.shard_sizes[shard] for shard, sample in seen)


@each_form
@settings(max_examples=60, deadline=None)
@given(data=st.data(), slots=st.sampled_from([4, 6, 8, 12]), times=st.integers(1, 5))
def test_ranks_end_to_end_are_the_same_batch_for_every_world(
    data: st.DataObject, slots: int, times: int
) -> None:
    order = draw_order(data, slots)
    batch_size = slots * times
    position = batch_size * data.draw(st.integers(0, 50))
    whole = order.batch(position, batch_size)
    assert len(whole) == batch_size
    for world in (count for count in range(1, batch_size + 1) if batch_size % count == 0):
        fresh = SampleOrder(order.shard_sizes.tolist(), seed=order.seed, slots=slots)
        parts = [fresh.batch(position, batch_size, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {batch_size // world}
        assert list(chain(*parts)) == whole


@each_form
@settings(max_examples=60, deadline=None)
@given(data=st.data(), slots=st.sampled_from([2, 4]), small=st.integers(1, 4))
def test_larger_batches_hold_the_same_samples_as_smaller_ones(
    data: st.DataObject, slots: int, small: int
) -> None:
    """So a restart may go on with another batch size, from any cursor that slots divide."""
    order = draw_order(data, slots)
    large = small * 3
    start = slots * data.draw(st.integers(0, 30))
    once = order.batch(start, large * slots)
    pieces = stream(order, start, start + large * slots, small * slots)
    assert Counter(once) == Counter(chain(*pieces))
    assert stream(order, start, start + large * slots, small * slots) == pieces


@each_form
@settings(max_examples=30, deadline=None)
@given(data=st.data(), slots=st.sampled_from([2, 4]))
def test_jumping_to_a_cursor_gives_what_walking_to_it_gives(
    data: st.DataObject, slots: int
) -> None:
    walked = draw_order(data, slots)
    batches = stream(walked, 0, 3 * walked.samples_per_epoch + 2 * slots, 2 * slots)
    place = data.draw(st.integers(0, len(batches) - 1))
    jumped = SampleOrder(walked.shard_sizes.tolist(), seed=walked.seed, slots=slots)
    assert jumped.batch(place * 2 * slots, 2 * slots) == batches[place]
    assert walked.batch(0, 2 * slots) == batches[0]


def test_epochs_and_seeds_differ(form: str) -> None:
    def first_epoch(seed: int, epoch: int) -> list[tuple[int, ...]]:
        order = SampleOrder([50] * 4, seed=seed, slots=4)
        begin = epoch * order.samples_per_epoch
        return [a[1:] for a in order.batch(begin, order.samples_per_epoch)]

    streams = [first_epoch(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(first != second for first, second in pairwise(streams))
    assert first_epoch(0, 1) == first_epoch(0, 1)


def test_skipped_samples_differ_between_epochs(form: str) -> None:
    order = SampleOrder([13] * 5, seed=0, slots=8)
    everything = {(shard, sample) for shard in range(5) for sample in range(13)}
    left_out = []
    for epoch in range(6):
        batch = order.batch(epoch * order.samples_per_epoch, order.samples_per_epoch)
        left_out.append(frozenset(everything - {a[1:] for a in batch}))
    assert {len(samples) for samples in left_out} == {1}
    assert len(set(left_out)) > 1


def test_the_order_equals_recorded_values() -> None:
    """Another order here would send every resumed run through other data."""
    small = SampleOrder([3, 0, 5], seed=7, slots=2).batch(0, 8)
    assert [a[1:] for a in small] == [
        (2, 1),
        (2, 4),
        (0, 1),
        (2, 3),
        (2, 2),
        (2, 0),
        (0, 0),
        (0, 2),
    ]
    large = SampleOrder([40_000, 30_000], seed=7, slots=2).batch(0, 4)
    assert [a[1:] for a in large] == [(0, 7483), (0, 9774), (0, 36206), (1, 30)]


def test_a_large_set_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand million samples: nothing as long as the set is ever made."""
    order = SampleOrder([10_000] * 100_000, seed=0)
    made: list[int] = []
    real = order_module.shuffled

    def count(size: int, *key: int | str) -> np.ndarray:
        made.append(size)
        return real(size, *key)

    monkeypatch.setattr(order_module, "shuffled", count)
    batch = order.batch(2048 * 1000, 2048, rank=3, world=64)
    assert len(set(batch)) == 32
    assert sum(made) <= 100_000 + 2 * order_module.BLOCK_SAMPLES


def test_a_batch_mixes_shards_and_a_rank_touches_few(form: str) -> None:
    order = SampleOrder([100] * 64, seed=0, slots=16)
    batch = order.batch(0, 64)
    assert len({a.shard for a in batch}) >= 16
    if form == "blocks":
        epoch = [
            address
            for position in range(0, order.samples_per_epoch, 64)
            for address in order.batch(position, 64, rank=0, world=8)
        ]
        assert len({a.shard for a in epoch}) <= 64 // 8 + 1


@pytest.mark.parametrize(
    ("sizes", "slots", "words"),
    [
        ([3, 4], 8, "7 samples .* 8 slots"),
        ([], 1, "0 samples .* 1 slot"),
        ([5], 0, "at least 1"),
        ([5, -1], 1, "at least 0"),
    ],
)
def test_impossible_shard_sizes_are_refused(sizes: list[int], slots: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SampleOrder(sizes, seed=0, slots=slots)


@pytest.mark.parametrize(
    ("position", "batch_size", "rank", "world", "words"),
    [
        (0, 12, 0, 1, "12 .*8 slots; use 8"),
        (0, 0, 0, 1, "use 8"),
        (0, 8, 0, 3, "use 1, 2, 4, 8 processes"),
        (0, 48, 0, 10, "use 4, 6, 8, 12 processes"),
        (0, 8, 0, 0, "0 processes"),
        (0, 8, 2, 2, "from 0 to 1"),
        (4, 8, 0, 1, "cursor 4"),
        (-8, 8, 0, 1, "cursor -8"),
    ],
)
def test_impossible_batches_are_refused(
    position: int, batch_size: int, rank: int, world: int, words: str
) -> None:
    order = SampleOrder([100], seed=0, slots=8)
    with pytest.raises(ValueError, match=words):
        order.batch(position, batch_size, rank, world)


@pytest.mark.parametrize(
    ("batch_size", "samples", "slots"),
    [(2048, 10**6, 64), (96, 10**6, 48), (32, 10**6, 32), (64, 40, 32), (7, 3, 1), (9216, 99, 64)],
)
def test_slots_for_a_batch(batch_size: int, samples: int, slots: int) -> None:
    assert slots_for(batch_size, samples) == slots


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 50))
def test_one_slot_takes_any_batch_and_leaves_nothing_out(
    data: st.DataObject, batch_size: int
) -> None:
    """Batches that do not divide an epoch run on into the next one."""
    order = draw_order(data, slots=1)
    assert order.samples_per_epoch == order.samples
    steps = -(-3 * order.samples // batch_size)
    addresses = list(chain(*stream(order, 0, steps * batch_size, batch_size)))
    for epoch in range(3):
        seen = Counter(a[1:] for a in addresses if a.epoch == epoch)
        assert len(seen) == order.samples
        assert set(seen.values()) == {1}
    assert [a.epoch for a in addresses] == sorted(a.epoch for a in addresses)


@pytest.mark.parametrize("batch_size", [8, 16, 32, 50])
def test_107_samples_are_all_in_each_epoch(batch_size: int) -> None:
    slots = choose_slots([107], batch_size)
    assert slots == 1
    order = SampleOrder([60, 47], seed=0, slots=slots)
    for world in (1, 2):
        parts = [order.batch(3 * batch_size, batch_size, rank, world) for rank in range(world)]
        assert list(chain(*parts)) == order.batch(3 * batch_size, batch_size)
    batches = stream(order, 0, 107 * batch_size, batch_size)
    counts = Counter(address.epoch for batch in batches for address in batch)
    assert set(counts.values()) == {107}
    assert describe_order(order) == "one shuffle of all samples per epoch"


def test_slots_follow_from_the_sizes_of_sets() -> None:
    large = WHOLE_SHUFFLE_LIMIT + 1
    assert choose_slots([WHOLE_SHUFFLE_LIMIT], 2048) == 1
    assert choose_slots([large], 2048) == 64
    assert choose_slots([large], 50) == 50
    assert choose_slots([large, large], 96) == 48
    assert choose_slots([107, large, 12], 96) == (1, 48, 1)
    assert choose_slots([107, 12], 96) == 1


def test_slots_that_leave_samples_out_are_told() -> None:
    few = SampleOrder([107], seed=0, slots=64)
    assert needless_slots(few)
    assert "43 samples out of each epoch" in describe_order(few)
    assert not needless_slots(SampleOrder([100], seed=0, slots=10))
    large = SampleOrder([WHOLE_SHUFFLE_LIMIT + 1], seed=0, slots=64)
    assert not needless_slots(large)
    assert "1 samples out" in describe_order(large)
    mixed = MixedOrder([[107], [70_000]], [1, 1], seed=0, slots=(1, 64))
    assert not needless_slots(mixed)
    assert needless_slots(MixedOrder([[107], [70_000]], [1, 1], seed=0, slots=64))
