"""The table of `data-prep info`."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.format.text import format_bytes
from data_prep.inspect.info import describe_shards
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions


def test_the_table_counts_samples_and_classes(image_zip: Path, tmp_path: Path) -> None:
    built = build_shards(image_zip, tmp_path / "out", ShardOptions(samples_per_shard=6))
    lines = [line.split(maxsplit=1) for line in describe_shards(built.manifest).splitlines()]
    rows = {name: value for name, value in lines if not name[0].isdigit()}
    assert rows["samples"] == "24 (18 jpg, 6 png)"
    assert rows["shards"] == "4 with 6 samples"
    assert rows["labelled"] == "24 of 24"
    assert lines[-3:] == [["12", "cat"], ["6", "dog"], ["6", "owl"]]


@pytest.mark.parametrize(("count", "text"), [(1, "1 array of"), (3, "3 arrays of")])
def test_arrays_are_counted_in_their_number(count: int, text: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(count):
        np.save(tmp_path / "in" / f"{number}.npy", np.zeros((4, 4, 5), dtype=np.uint16))
    built = build_shards(tmp_path / "in", tmp_path / "out", ShardOptions())
    assert f"{text} 5 channels, uint16" in describe_shards(built.manifest)


@pytest.mark.parametrize(
    ("length", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")]
)
def test_lengths_have_units(length: int, text: str) -> None:
    assert format_bytes(length) == text
