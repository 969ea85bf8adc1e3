"""The assignment of samples to shards depends on listing and options alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sources.files import Selection, SourceFile
from data_prep.write.options import ShardOptions
from data_prep.write.plan import Cutter, count_shards, is_held_out, order_key


def _files(count: int) -> list[SourceFile]:
    return [SourceFile(f"{number // 9}/{number:05d}.jpg", 1000, 0) for number in range(count)]


def _cut(sizes: list[int], options: ShardOptions, min_shards: int = 8) -> list[list[int]]:
    cutter = Cutter(
        count=len(sizes), total_bytes=sum(sizes), options=options, min_shards=min_shards
    )
    shards: list[list[int]] = []
    for size in sizes:
        if cutter.starts_shard(size):
            shards.append([])
        shards[-1].append(size)
    return shards


def _order(files: list[SourceFile], seed: int) -> list[SourceFile]:
    options = ShardOptions(seed=seed)
    return sorted(files, key=lambda file: order_key(file, options))


@given(st.integers(1, 500), st.none() | st.integers(1, 600))
def test_shards_are_of_nearly_equal_numbers(count: int, samples_per_shard: int | None) -> None:
    options = ShardOptions(samples_per_shard=samples_per_shard)
    sizes = [len(shard) for shard in _cut([1000] * count, options)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= (samples_per_shard or count)
    assert len(sizes) == count_shards(count, 1000 * count, options)


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(1, 200), st.integers(1, 9))
def test_shards_by_bytes_are_full_and_no_fuller(sizes: list[int], limit: int, most: int) -> None:
    shards = _cut(sizes, ShardOptions(bytes_per_shard=limit, samples_per_shard=most))
    assert [size for shard in shards for size in shard] == sizes
    for shard in shards:
        assert len(shard) == 1 or sum(shard) <= limit
        assert len(shard) <= most
    for shard, after in itertools.pairwise(shards):
        assert len(shard) == most or sum(shard) + after[0] > limit


@given(st.integers(2, 200), st.integers(-5, 5), st.data())
def test_the_shuffle_depends_on_seed_and_path_alone(
    count: int, seed: int, data: st.DataObject
) -> None:
    files = _files(count)
    mixed = data.draw(st.permutations(files))
    assert _order(mixed, seed) == _order(files, seed)
    fewer = [file for file in _order(files, seed) if file != files[0]]
    assert _order(files[1:], seed) == fewer


def test_seeds_differ() -> None:
    assert _order(_files(50), 0) != _order(_files(50), 1)


def test_the_same_share_is_held_out_whatever_else_there_is() -> None:
    options = ShardOptions(validation_fraction=0.2)
    held = {file.path for file in _files(5000) if is_held_out(file.path, options)}
    assert 900 < len(held) < 1100
    more = ShardOptions(validation_fraction=0.3)
    assert all(is_held_out(path, more) for path in held)
    other = ShardOptions(validation_fraction=0.2, seed=1)
    assert held != {file.path for file in _files(5000) if is_held_out(file.path, other)}


def test_default_number_of_shards() -> None:
    options = ShardOptions()
    assert count_shards(3, 3000, options) == 3
    assert count_shards(122, 122_000, options) == 8
    assert count_shards(200_001, 200_001_000, options) == 21
    assert count_shards(100, 100 * 2**28, options) == 100
    assert count_shards(0, 0, options) == 0


def test_invalid_options_are_reported() -> None:
    with pytest.raises(ValueError, match="--samples-per-shard is 0; it must be 1 or more"):
        ShardOptions(samples_per_shard=0)
    with pytest.raises(ValueError, match="--max-pixels"):
        ShardOptions(max_pixels=0)
    with pytest.raises(ValueError, match="--max-bytes"):
        ShardOptions(selection=Selection(max_bytes=-1))
    with pytest.raises(ValueError, match=r"--validation-fraction is 1\.0; it must"):
        ShardOptions(validation_fraction=1.0)
    with pytest.raises(ValueError, match="--seed"):
        ShardOptions(seed=2**70)
