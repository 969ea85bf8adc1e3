"""Tables that depend on sizes alone, built once."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

Sizes = ParamSpec("Sizes")


def kept(build: Callable[Sizes, Tensor]) -> Callable[Sizes, Tensor]:
    """Keep the tables that a pure function of sizes, dtype and device has built lately.

    A kept table is shared: it must not be changed in place.
    """

    @lru_cache(maxsize=64)
    def build_once(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Tensor:
        # A kept table outlives the inference mode that it may be first needed in.
        with torch.inference_mode(False):
            return build(*args, **kwargs)

    @wraps(build)
    def table(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Tensor:
        # What is built while a graph is traced belongs to the trace.
        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        return build_once(*args, **kwargs)  # type: ignore[arg-type]  # sizes do hash

    return table
