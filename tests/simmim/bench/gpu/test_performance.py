"""The counts behind ceilings, and the table of docs/performance.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from simmim.bench.gpu.performance import HEADS, VARIANTS, rows
from simmim.bench.gpu.report import table
from simmim.bench.gpu.selftest import quiet_compiler
from simmim.bench.roofline.ceiling import (
    DATA_SHEETS,
    Operation,
    Peaks,
    StepSize,
    least_seconds,
    share_of_peak,
)
from simmim.bench.roofline.counting import count_compiled, count_eager
from simmim.bench.roofline.work import config_of, step_operations
from swinv2.flops import forward_flops

ROOT = Path(__file__).parents[4]
DOCUMENT = (ROOT / "docs" / "performance.md").read_text()


def test_each_operation_takes_the_longer_of_its_times() -> None:
    peaks = Peaks(flops=100.0, bytes=10.0)
    product = Operation(name="mm", flops=300, bytes=10)
    copy = Operation(name="copy", flops=0, bytes=5)
    assert least_seconds([product, copy], peaks) == 3 + 0.5
    assert share_of_peak(50, 2, 6.0, peaks) == 0.5


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


def test_eager_operators_read_inputs_and_write_outputs() -> None:
    left, right = meta(8, 16), meta(16, 4)
    assert count_eager(lambda: (left @ right).t().add_(1)) == [
        Operation(name="mm", flops=2 * 8 * 16 * 4, bytes=2 * (8 * 16 + 16 * 4 + 8 * 4)),
        Operation(name="add_", flops=0, bytes=2 * 2 * 8 * 4),
    ]
    assert count_eager(lambda: left.view(128).expand(3, 128).detach()) == []


def test_compiled_operators_between_products_are_one_kernel() -> None:
    layers = nn.Sequential(nn.Linear(16, 8, bias=False), nn.GELU(), nn.Linear(8, 4, bias=False))
    layers.to("meta", torch.bfloat16)
    tokens, upstream = meta(32, 16), torch.empty_like(meta(32, 4))

    def run(backend: Any) -> None:
        mapped = torch.compile(layers, backend=backend)(tokens)
        torch.autograd.grad(mapped, [tokens, *layers.parameters()], upstream)

    with quiet_compiler():
        operations = count_compiled(run)
    products = [one for one in operations if one.flops]
    assert len(products) == 6
    assert sum(one.flops for one in products) == 3 * 2 * 32 * (16 * 8 + 8 * 4)
    # GELU reads and writes; on the way back it reads its input and a gradient, and writes another
    # and, if it was not kept for the gradient of a weight, its output again.
    moved = sum(one.bytes for one in operations if not one.flops)
    assert moved / (2 * 32 * 8) in (5, 6)


@pytest.mark.parametrize("mode", ["eager", "epilogues", "fused"])
def test_a_step_has_the_products_that_the_model_requires(mode: Any) -> None:
    size = StepSize(variant="tiny", image_size=192, window_size=12)
    flops = sum(one.flops for one in step_operations(size, 4, mode)) / 4
    assert flops == pytest.approx(3 * forward_flops(config_of(size, {})), rel=0.04)


def test_attention_as_one_kernel_writes_no_scores() -> None:
    """By hand, for a single block of 16 windows of 16 tokens, 2 heads of 8 channels."""
    size = StepSize(variant="tiny", image_size=64, window_size=4)
    overrides = {"embed_dim": 16, "depths": (1,), "num_heads": (2,)}
    with quiet_compiler():
        operations = step_operations(size, 1, "kernel", overrides)
    by_name = {one.name: one for one in operations}
    tokens, dim, scores = 16 * 16, 16, 2 * 16 * 16 * 16 * 16
    forward, backward = (
        by_name[name] for name in ("sequential_attention", "sequential_attention_backward")
    )
    bias = 2 * 16 * 16 * 4 + 2 * 4  # and its scale, of each head
    assert forward.flops == 2 * scores
    assert forward.bytes == pytest.approx(2 * 4 * tokens * dim + bias, abs=16)
    assert backward.flops == 5 * scores
    assert backward.bytes == pytest.approx(2 * 8 * tokens * dim + 2 * bias, rel=0.15)


def documented() -> dict[tuple[str, str], list[str]]:
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("| ")]
    assert lines[:2] == table(HEADS, []).splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {(row[0], row[1]): row for row in found}


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"), reason="the table counts operators of torch 2.13"
)
def test_the_documented_table_is_what_the_function_computes() -> None:
    found = documented()
    assert len(found) == 15
    for variant in VARIANTS:
        for row in rows(variant, ("eager", "epilogues", "fused")):
            assert found[row[0], row[1]] == row


@pytest.mark.slow  # tracing blocks takes seconds
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_documented_compiled_rows_are_what_the_function_computes(variant: str) -> None:
    with quiet_compiler():
        for row in rows(variant, ("compiled", "kernel")):
            assert documented()[variant, row[1]] == row


def test_the_document_says_what_the_table_says() -> None:
    assert "No figures have been measured on a GPU yet" in DOCUMENT
    compiled = documented()["base", "compiled"]
    per_gflop = float(compiled[3].replace(",", "")) / float(compiled[2])
    assert f"base moves {per_gflop:.0f} MB per GFLOP" in DOCUMENT
    balances = [1e3 * peaks.bytes / peaks.flops for peaks in DATA_SHEETS.values()]
    assert f"{min(balances):.0f} to {max(balances):.0f} MB" in DOCUMENT
    assert "(docs/performance.md)" in (ROOT / "README.md").read_text()
