"""Compiled blocks on tensors without values: they allocate what compiled graphs would.

Forward and backward of a block are traced together and cut apart as torch.compile does it, which
decides what is saved for the backward. Within a graph, operators between products are fused, and
only what products, the backward or a reduction need is written (`roofline.counting`). It takes
neither a GPU nor Triton. Blocks of the same sizes are traced once, in half a second.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simmim.bench.graph_memory import GraphMemory, graph_memory
from simmim.compat import compiled_graphs, map_tensors, recomputed_in_backward, tensors_in
from swinv2 import SwinV2, blocks
from swinv2.blocks import Block

_TRACED: dict[Hashable, GraphMemory] = {}


def count_compiled_blocks(encoder: SwinV2) -> None:
    """Let the blocks of an encoder allocate what compiled ones would, and compute nothing."""
    for block in encoder.blocks:
        assert isinstance(block, Block)
        block.compiled_run = _run


def _run(block: Block, *args: Any) -> Tensor:
    """Run a block in place of its compiled function: tokens, grid, tables and drop path factors."""
    inputs = [*block.parameters(), *tensors_in(args)]
    found: Tensor = _Allocate.apply(block_memory(block, *args), *inputs)  # type: ignore[no-untyped-call]
    return found


class _Allocate(torch.autograd.Function):
    """Allocate what a block's forward and backward do."""

    @staticmethod
    def forward(ctx: Any, memory: GraphMemory, *inputs: Tensor) -> Tensor:
        device = inputs[0].device
        _allocate(memory.forward, device)
        output = torch.empty(memory.output.shape, dtype=memory.output.dtype, device=device)
        saved = [inputs[number] for number in memory.saved_inputs]
        saved += [output] * memory.saves_output
        saved += [_allocate(size, device) for size in memory.saved]
        ctx.save_for_backward(*saved)
        ctx.memory = memory
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        memory: GraphMemory = ctx.memory
        saved = ctx.saved_tensors  # of a checkpointed block, they are made here
        _allocate(memory.backward, gradient.device)
        del saved
        ctx.maybe_clear_saved_tensors()
        gradients = (
            None if one is None else torch.empty(one.shape, dtype=one.dtype, device=gradient.device)
            for one in memory.gradients
        )
        return (None, *gradients)


def _allocate(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def block_memory(block: Block, tokens: Tensor, *rest: Any) -> GraphMemory:
    """Return what a compiled block allocates for the arguments of `Block.run`."""
    args = (tokens, *rest)
    weights, tensors = list(block.parameters()), tensors_in(args)
    kind = tokens.device.type
    grid, *_ = rest
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    attention = block.attention
    key = (
        grid,
        (attention.path, attention.scores_at_a_time, block.checkpointing == "attention"),
        # Under the rules of CUDA a tensor on the CPU says that it is not.
        (kind, tokens.is_cpu, autocast),
        tuple((one.shape, one.dtype, one.requires_grad) for one in (*weights, *tensors)),
    )
    if key not in _TRACED:
        _TRACED[key] = _trace(block, args)
    return _TRACED[key]


class _Run(nn.Module):
    """A block whose forward is what is compiled of it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Tensor:
        return Block.run(self.block, *args)


def _trace(block: Block, args: tuple[Any, ...]) -> GraphMemory:
    whole = _Run(block)
    names, weights = zip(*whole.named_parameters(), strict=True)

    def function(weights: list[Tensor], tensors: list[Tensor]) -> Tensor:
        given = iter(tensors)
        named = dict(zip(names, weights, strict=True))
        output: Tensor = functional_call(whole, named, map_tensors(lambda _: next(given), args))
        return output

    with _checkpointing_as_compiled():
        forward, backward = compiled_graphs(function, list(weights), tensors_in(args))
    return graph_memory(forward, backward)


@contextmanager
def _checkpointing_as_compiled() -> Iterator[None]:
    """Let blocks mark what is computed again in the backward, which is then cut out of graphs."""
    recompute = blocks._recompute

    def mark(function: Any, *args: Any) -> Any:
        with recomputed_in_backward():
            return function(*args)

    blocks._recompute = mark
    try:
        yield
    finally:
        blocks._recompute = recompute
