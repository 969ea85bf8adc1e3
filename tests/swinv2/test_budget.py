"""A block launches no more kernels, and moves no more bytes, than it has to.

Operations are counted on the CPU, with the kernels and the types that CUDA's rules choose.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmim.bench.cuda_rules import cuda_rules
from simmim.bench.live_bytes import OPERATORS
from swinv2 import build_encoder
from swinv2.kernels.relative_position_ops import sum_relative_positions

TOKENS, HEADS, BATCH, WINDOWS = 64, 4, 2, 4
SCORES = BATCH * WINDOWS * HEADS * TOKENS**2
"""The unit of the budget; in windows this small most bytes are those of tokens and weights."""


class Traffic(TorchDispatchMode):
    """Count operations that are not views, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        body = OPERATORS.get(function)
        if body is not None:
            with self:
                return body(*args, **kwargs or {})
        outcome = function(*args, **kwargs or {})
        empty = function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty)
        if not function.is_view and not empty:
            self.launches += 1
            tensors = [one for one in tree_leaves((args, outcome)) if isinstance(one, Tensor)]
            self.nbytes += sum(one.numel() * one.element_size() for one in tensors)
        return outcome


@pytest.mark.parametrize(
    ("path", "launches", "bytes_per_score"),
    [("auto", 210, 380), ("sequential", 210, 400), ("explicit", 240, 460)],
)
def test_a_block_keeps_to_its_budget(path: Any, launches: int, bytes_per_score: float) -> None:
    sizes = {"depths": (2,), "num_heads": (HEADS,), "embed_dim": 32 * HEADS, "window_size": 8}
    encoder = build_encoder("tiny", image_size=64, **sizes)
    encoder.set_execution(attention=path)
    block = encoder.blocks[1]  # the shifted one
    tokens = torch.randn(BATCH, 16, 16, 32 * HEADS, dtype=torch.bfloat16, requires_grad=True)
    with cuda_rules(), torch.autocast("cpu", torch.bfloat16):
        block(tokens)  # makes the tables
        with Traffic() as traffic:
            output = block(tokens)
    with cuda_rules(), traffic:
        output.sum().backward()
    assert traffic.launches <= launches
    assert traffic.nbytes / SCORES <= bytes_per_score


def test_sums_by_position_take_few_launches() -> None:
    with Traffic() as traffic:
        sum_relative_positions._init_fn(torch.randn(HEADS, TOKENS, TOKENS), [8, 8])
    assert traffic.launches <= 8
