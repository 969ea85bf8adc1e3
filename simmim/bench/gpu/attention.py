"""Speed of window attention, forward and backward, by the size of its windows."""

import math
from collections.abc import Callable
from typing import Any

import torch

from simmim.bench.gpu.cells import Results, Values
from simmim.bench.gpu.machine import measure
from simmim.bench.gpu.scale import Scale
from simmim.bench.gpu.selftest import quiet_compiler
from simmim.bench.gpu.steps import free_memory_of_earlier_cells, measured_peaks
from simmim.bench.roofline.ceiling import Operation, least_seconds
from simmim.bench.roofline.counting import count_compiled, count_eager
from simmim.bench.roofline.work import run_both_ways
from swinv2.attention import WindowAttention, WindowGrid
from swinv2.config import AttentionPath

ALONG_AN_AXIS = 2
"""Windows along each axis of the map."""


def measure_attention(
    scale: Scale, results: Results, window: int, path: AttentionPath, *, compiled: bool
) -> Values:
    """Measure shifted window attention with its two linear layers, in bf16.

    Its ceiling is not known for sdpa: which kernel runs is for the device to choose.
    """
    device = scale.torch_device
    free_memory_of_earlier_cells(device)
    grid = _grid(window)
    batch = _batch(scale, window)
    attention = _build(scale, grid, path).to(device)
    tokens = torch.randn(
        batch, *grid.resolution, scale.attention_channels, device=device, requires_grad=True
    )
    tables = attention.tables(grid)
    call: Callable[..., Any] = attention
    if compiled:
        call = torch.compile(attention, fullgraph=True, backend=scale.backend)
    upstream = torch.ones_like(tokens, dtype=torch.bfloat16)
    wanted = [tokens, *attention.parameters()]

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            outcome = call(tokens, grid, tables)
        torch.autograd.grad(outcome, wanted, upstream.to(outcome.dtype))

    with quiet_compiler():
        spread = measure(run, scale)
    scores = batch * math.prod(grid.windows) * window**4 * scale.attention_heads
    found: dict[str, Any] = {
        "tokens of a window": window**2,
        "tokens": batch * math.prod(grid.resolution),
        "scores per second": scores / spread["seconds"],
        **spread,
    }
    peaks = measured_peaks(results)
    if peaks is not None and path != "sdpa":
        operations = _operations(scale, grid, batch, path, compiled)
        flops = sum(operation.flops for operation in operations)
        found["share of the measured peak"] = flops / spread["seconds"] / peaks.flops
        found["share of the ceiling"] = least_seconds(operations, peaks) / spread["seconds"]
    return found


def _grid(window: int) -> WindowGrid:
    side = ALONG_AN_AXIS * window
    return WindowGrid((side, side), (window, window), (window // 2, window // 2))


def _batch(scale: Scale, window: int) -> int:
    """Return the images of a call: as many as tokens and scores allow."""
    tokens = ALONG_AN_AXIS**2 * window**2
    scores = tokens * window**2 * scale.attention_heads
    return max(1, min(scale.attention_tokens // tokens, scale.attention_scores // scores))


def _build(scale: Scale, grid: WindowGrid, path: AttentionPath) -> WindowAttention:
    attention = WindowAttention(scale.attention_channels, scale.attention_heads, grid.window)
    attention.path = path
    return attention.train()


def _operations(
    scale: Scale, grid: WindowGrid, batch: int, path: AttentionPath, compiled: bool
) -> list[Operation]:
    attention = _build(scale, grid, path).to("meta", torch.bfloat16)
    shape = (batch, *grid.resolution, scale.attention_channels)
    tokens = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    tables = attention.tables(grid)
    if not compiled:
        return count_eager(lambda: run_both_ways(attention, tokens, grid, tables))

    def run(backend: Callable[..., Any]) -> None:
        attention.compile(fullgraph=True, backend=backend)
        run_both_ways(attention, tokens, grid, tables)

    with quiet_compiler():
        return count_compiled(run)
