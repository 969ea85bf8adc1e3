"""Cache of tables that depend on sizes only."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

Sizes = ParamSpec("Sizes")


def cached_table(build: Callable[Sizes, Tensor]) -> Callable[Sizes, Tensor]:
    """Cache the recent results of a pure function of sizes, dtype and device.

    A cached table is shared: it must not be changed in place.
    """

    @lru_cache(maxsize=64)
    def build_once(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Tensor:
        # A cached table outlives the inference mode in which it may be built.
        with torch.inference_mode(False):
            return build(*args, **kwargs)

    @wraps(build)
    def table(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Tensor:
        # A tensor that is built during tracing belongs to the trace.
        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        return build_once(*args, **kwargs)  # type: ignore[arg-type]  # sizes are hashable

    return table
