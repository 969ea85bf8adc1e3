"""Operations of a training step of SimMIM: as implemented, eager and compiled, or fused further.

Weights, gradients and tokens are bf16, as under autocast; casts of weights, clipping and AdamW are
added. Blocks of the same size are counted once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from simmim.bench.roofline.ceiling import Operation, StepSize
from simmim.bench.roofline.counting import count_compiled, count_eager
from simmim.method.model import SimMIM
from swinv2 import SwinV2, variant_config
from swinv2.attention import WindowGrid, window_grid
from swinv2.blocks import Block, compile_run
from swinv2.config import SwinV2Config

Mode = Literal["eager", "compiled", "kernel", "epilogues", "fused"]
"""Operator by operator; blocks compiled; compiled with attention as one kernel; that with GELU in
the products and one pass for each norm; or everything in the products. The last two are counted by
formula, and nobody has them."""
NUMBER = 2
"""Bytes of a bf16 number."""
ATTENTION = {"sequential_attention": 2, "sequential_attention_backward": 5}
"""Products of the operators of attention; the backward computes scores again."""
BYTES_OF_A_WEIGHT = 52
"""Bytes that a step moves per weight, apart from products: its bf16 copy is written (6) and its
gradient made float32 (6), clipped (12), and read by AdamW with weight and states, which it writes
(28)."""


def step_operations(
    size: StepSize, batch: int, mode: Mode, overrides: Mapping[str, Any] | None = None
) -> list[Operation]:
    """Return the operations of a training step of `batch` images."""
    config, encoder = _shallow(size, overrides or {})
    operations = [_optimizer(size, overrides or {})]
    blocks = list(_kinds_of_blocks(config))
    for grid, dim, number, (stage, position) in blocks:
        if mode in ("epilogues", "fused"):
            whole = mode == "fused"
            found = _fused_block(grid, dim, batch, config.mlp_ratio, whole=whole)
        else:
            block = encoder.stages[stage].blocks[position]  # type: ignore[index]
            assert isinstance(block, Block)
            found = _count_block(block, grid, (batch, *grid.resolution, dim), mode)
        operations += [_times(one, number) for one in found]
    return operations if mode == "fused" else operations + _count_outside(encoder, batch)


def config_of(size: StepSize, overrides: Mapping[str, Any]) -> SwinV2Config:
    """Return the config of the encoder of a step."""
    return variant_config(
        size.variant, image_size=size.image_size, window_size=size.window_size, **overrides
    )


def _shallow(size: StepSize, overrides: Mapping[str, Any]) -> tuple[SwinV2Config, SwinV2]:
    """Return the config of a step, and its encoder with two blocks a stage at most."""
    config = config_of(size, overrides)
    depths = tuple(min(depth, 2) for depth in config.depths)
    shallow = replace(config, variant=None, depths=depths)
    with torch.device("meta"):
        encoder = SwinV2(shallow).to(torch.bfloat16).train()
    return config, encoder


def _kinds_of_blocks(
    config: SwinV2Config,
) -> Iterator[tuple[WindowGrid, int, int, tuple[int, int]]]:
    """Yield each kind of block: grid, channels, how many there are, stage and number of one."""
    for stage, (dim, depth) in enumerate(zip(config.stage_dims, config.depths, strict=True)):
        kinds: dict[WindowGrid, list[int]] = {}
        for position in range(depth):
            grid = window_grid(
                config.stage_maps[stage], config.map_window, shifted=position % 2 == 1
            )
            kinds.setdefault(grid, []).append(position)
        for grid, positions in kinds.items():
            yield grid, dim, len(positions), (stage, positions[0])


def _times(operation: Operation, number: float) -> Operation:
    """Return an operation that is done so many times."""
    return replace(operation, flops=operation.flops * number, bytes=operation.bytes * number)


def _count_block(
    block: Block, grid: WindowGrid, shape: Sequence[int], mode: Mode
) -> list[Operation]:
    tokens = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    if mode == "eager":
        return count_eager(lambda: run_both_ways(block, tokens))

    def compile_and_run(backend: Callable[..., Any]) -> None:
        block.compiled_run = compile_run(backend=backend)
        run_both_ways(block, tokens)

    path = block.attention.path
    if mode == "kernel":  # sequential attention is one operator in a graph, and saves no scores
        block.attention.path = "sequential"
    try:
        operations = count_compiled(compile_and_run)
    finally:
        block.compiled_run, block.attention.path = None, path
    scores = _flops_of_scores(grid, shape[0], shape[-1])
    return [
        replace(one, flops=scores * ATTENTION.get(one.name, 0) or one.flops) for one in operations
    ]


def _flops_of_scores(grid: WindowGrid, batch: int, dim: int) -> int:
    """Return the FLOPs of one of the two products of attention, over all heads."""
    return 2 * batch * math.prod(grid.windows) * math.prod(grid.window) ** 2 * dim


def run_both_ways(module: nn.Module, tokens: torch.Tensor, *rest: Any) -> None:
    """Run a module forward and backward, to the gradients of its input and its weights."""
    outcome = module(tokens, *rest)
    wanted = [tokens, *module.parameters()]
    torch.autograd.grad(outcome, wanted, torch.empty_like(outcome))


def _count_outside(encoder: SwinV2, batch: int) -> list[Operation]:
    """Count all but the blocks, which stay eager: embedding, merging, norms and the method."""
    for stage in encoder.stages:
        stage.blocks = nn.ModuleList()
    with torch.device("meta"):
        model = SimMIM(encoder).to(torch.bfloat16).train()
    config = encoder.config
    images = torch.empty(
        batch, config.in_channels, *config.image_size, device="meta", dtype=torch.bfloat16
    )
    rows, columns = (side // model.mask_cell for side in config.image_size)
    hidden = torch.arange(rows * columns) < round(0.6 * rows * columns)
    mask = hidden.view(rows, columns).expand(batch, rows, columns)

    def run() -> None:
        torch.autograd.grad(model(images, mask).loss, list(model.parameters()))

    return count_eager(run)


def _optimizer(size: StepSize, overrides: Mapping[str, Any]) -> Operation:
    with torch.device("meta"):
        model = SimMIM(SwinV2(config_of(size, overrides)))
    weights = sum(weight.numel() for weight in model.parameters())
    return Operation(name="optimizer", flops=0, bytes=BYTES_OF_A_WEIGHT * weights)


def _fused_block(
    grid: WindowGrid, dim: int, batch: int, mlp_ratio: float, *, whole: bool
) -> list[Operation]:
    """Return a block whose attention is one kernel each way, and never writes scores.

    Products read their operands and write their result. With `whole` they do everything else on
    the way. Without, they do GELU and the sum of gradients, and read and write what these need;
    each norm with its residual is one pass over the tokens each way.
    """
    tokens = batch * math.prod(grid.resolution)
    padded = batch * math.prod(grid.windows) * math.prod(grid.window)
    hidden = int(mlp_ratio * dim)
    layers = [(padded, dim, 3 * dim), (padded, dim, dim), (tokens, dim, hidden)]
    layers.append((tokens, hidden, dim))
    products = [
        Operation(
            name="product",
            flops=2 * rows * inner * outer,
            bytes=NUMBER * (rows * inner + inner * outer + rows * outer),
        )
        for rows, inner, outer in layers
    ]
    numbers = padded * dim
    scores = _flops_of_scores(grid, batch, dim)
    if whole:
        # Norm and residual, twice: the main branch is read and written; on the way back its
        # gradient is, and the other branch is read again.
        joins = 2 * (2 + 3) * tokens * dim
    else:
        # Twice, each way: two are read and one is written. The gradients of the inputs of both
        # branches are added to that of the main branch, which is read. What GELU is given is
        # written, and read on the way back.
        joins = 2 * (3 + 3 + 1) * tokens * dim + 2 * tokens * hidden
    return [
        *(_times(product, 3) for product in products),
        Operation(name="attention", flops=2 * scores, bytes=NUMBER * 4 * numbers),
        # In: queries, keys, values, output and its gradient; out: gradients of the first three.
        Operation(name="attention backward", flops=5 * scores, bytes=NUMBER * 8 * numbers),
        Operation(name="norms and residuals", flops=0, bytes=NUMBER * joins),
    ]
