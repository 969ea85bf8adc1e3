"""Cached tables are bounded by their bytes."""

import torch
from torch import Tensor

from swinv2.kernels import cached_tables
from swinv2.kernels.cached_tables import TableCache, cached_table
from swinv2.position_bias import relative_position_index


def test_the_longest_unused_are_dropped() -> None:
    cache = TableCache(largest=40)
    for key in "abc":
        cache.keep(key, torch.zeros(4))  # 16 bytes
    assert cache.get("a") is None
    assert cache.get("b") is not None
    cache.keep("d", torch.zeros(4))
    assert cache.get("c") is None
    assert cache.get("b") is not None
    assert (len(cache), cache.nbytes) == (2, 32)
    cache.keep("large", torch.zeros(11))
    assert cache.get("large") is None
    assert (len(cache), cache.nbytes) == (2, 32)


def test_tables_of_every_function_share_the_bound(monkeypatch) -> None:
    cache = TableCache(largest=100)
    monkeypatch.setattr(cached_tables, "TABLES", cache)
    built = []

    @cached_table
    def zeros(length: int) -> Tensor:
        built.append(length)
        return torch.zeros(length)

    @cached_table
    def ones(length: int) -> Tensor:
        return torch.ones(length)

    assert zeros(10) is zeros(10)
    assert torch.equal(ones(10), torch.ones(10))
    assert ones(10) is ones(10)
    for length in range(1, 12):
        zeros(length)
    assert cache.nbytes <= 100
    assert built == [10, *range(1, 12)] or built == [10, *range(1, 10), 11]


def test_indexes_take_four_bytes_a_pair() -> None:
    index = relative_position_index((12, 12), torch.device("cpu"))
    assert index.dtype == torch.int32
    assert index.nbytes == 4 * 144**2
