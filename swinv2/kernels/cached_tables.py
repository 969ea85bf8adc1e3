"""Cache of tables that depend on sizes only, bounded by their bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from swinv2.kernels.dispatch import is_exporting, use_operators

Sizes = ParamSpec("Sizes")

LARGEST_CACHE = 2**28
"""Bytes of all cached tables of a process; the longest unused are dropped first."""


class TableCache:
    """The most recently used tables, up to a number of bytes.

    Args:
        largest: bytes of all tables together; a single larger table is not kept.
    """

    def __init__(self, largest: int = LARGEST_CACHE) -> None:
        self.largest = largest
        self.nbytes = 0
        """Bytes of the tables that are kept."""
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tables)

    def get(self, key: Hashable) -> Tensor | None:
        """Return a table, None if it is not kept."""
        with self._lock:
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
            return table

    def keep(self, key: Hashable, table: Tensor) -> None:
        """Keep a table."""
        with self._lock:
            if table.nbytes > self.largest or key in self._tables:
                return
            self._tables[key] = table
            self.nbytes += table.nbytes
            while self.nbytes > self.largest:
                self.nbytes -= self._tables.popitem(last=False)[1].nbytes


TABLES = TableCache()


def cached_table(build: Callable[Sizes, Tensor]) -> Callable[Sizes, Tensor]:
    """Cache the results of a pure function of sizes, dtype and device.

    A cached table is shared: it must not be changed in place.
    """

    @wraps(build)
    def table(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Tensor:
        # What is built during tracing, or of fake tensors, belongs to the trace.
        if use_operators() or is_exporting():
            return build(*args, **kwargs)
        key: Any = (build, args, tuple(sorted(kwargs.items())))
        found = TABLES.get(key)
        if found is None:
            # A cached table outlives the inference mode in which it may be built.
            with torch.inference_mode(False):
                found = build(*args, **kwargs)
            TABLES.keep(key, found)
        return found

    return table
