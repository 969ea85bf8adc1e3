"""Which sample goes where depends on the listing and the options alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan import (
    ShardOptions,
    class_name,
    class_names,
    count_shards,
    plan_shards,
    shuffle_files,
)
from data_prep.sources import Selection, SourceFile


def _files(count: int, size: int = 1000) -> list[SourceFile]:
    return [SourceFile(f"{number // 9}/{number:05d}.jpg", size, 0) for number in range(count)]


@given(st.integers(1, 500), st.none() | st.integers(1, 600), st.booleans(), st.integers(0, 9))
def test_every_file_is_dealt_once(
    count: int, samples_per_shard: int | None, shuffle: bool, seed: int
) -> None:
    files = _files(count)
    options = ShardOptions(samples_per_shard=samples_per_shard, shuffle=shuffle, seed=seed)
    plans = list(plan_shards(files, options))
    dealt = [file for plan in plans for file in plan.files]
    sizes = [len(plan.files) for plan in plans]
    assert sorted(dealt) == sorted(files)
    assert shuffle or dealt == files
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= (samples_per_shard or count)
    assert [plan.number for plan in plans] == list(range(len(plans)))
    assert [plan.first for plan in plans] == [sum(sizes[:number]) for number in range(len(sizes))]
    assert len(plans) == count_shards(files, options)


@given(st.integers(2, 200), st.integers(-5, 5), st.data())
def test_the_shuffle_depends_on_seed_and_path_alone(
    count: int, seed: int, data: st.DataObject
) -> None:
    files = _files(count)
    mixed = data.draw(st.permutations(files))
    assert shuffle_files(mixed, seed) == shuffle_files(files, seed)
    fewer = [file for file in shuffle_files(files, seed) if file != files[0]]
    assert shuffle_files(files[1:], seed) == fewer


def test_seeds_differ() -> None:
    assert shuffle_files(_files(50), 0) != shuffle_files(_files(50), 1)


def test_default_number_of_shards() -> None:
    options = ShardOptions()
    assert count_shards(_files(3), options) == 3
    assert count_shards(_files(122), options) == 8
    assert count_shards(_files(200_001), options) == 21
    assert count_shards(_files(100, size=2**28), options) == 100
    assert count_shards([], options) == 0


def test_a_class_is_the_folder_a_file_lies_in() -> None:
    assert class_name("train/cat/1.jpg") == "cat"
    assert class_name("1.jpg") is None
    files = [SourceFile(path, 1, 0) for path in ("b/1.jpg", "x/a/1.jpg", "y/a/1.jpg", "1.jpg")]
    assert class_names(files) == ("a", "b")


def test_impossible_options_are_named() -> None:
    with pytest.raises(ValueError, match="--samples-per-shard must be at least 1, got 0"):
        ShardOptions(samples_per_shard=0)
    with pytest.raises(ValueError, match="--max-pixels"):
        ShardOptions(max_pixels=0)
    with pytest.raises(ValueError, match="--max-bytes"):
        ShardOptions(selection=Selection(max_bytes=-1))
    with pytest.raises(ValueError, match="--seed"):
        ShardOptions(seed=2**70)
