"""Fused attention equals explicit attention, and its gradients are right."""

import pytest
import torch
from torch import Tensor

from swinv2.attention import (
    ACROSS_REGIONS,
    PADDING,
    explicit_attention,
    window_grid,
    window_mask,
    window_regions,
)
from swinv2.kernels.fused import fused_attention

CPU = torch.device("cpu")
HEADS, WIDTH = 3, 4


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    grid = window_grid((7, 5), (4, 4), shifted=True)  # shifted, and padded to whole windows
    mask = window_mask(grid, CPU).to(dtype)
    tokens, windows = mask.shape[-1], len(mask)
    qkv = torch.randn(
        2, windows, tokens, 3 * HEADS * WIDTH, generator=generator, dtype=torch.float64
    )
    scale = 1 + 20 * torch.rand(HEADS, 1, 1, generator=generator, dtype=torch.float64)
    bias = 16 * torch.rand(HEADS, tokens, tokens, generator=generator, dtype=torch.float64)
    return (*(part.to(dtype).requires_grad_() for part in (qkv, scale, bias)), mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_it_equals_explicit_attention(dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    results = []
    for attend, precision in ((explicit_attention, torch.float64), (fused_attention, dtype)):
        qkv, scale, bias, mask = inputs(torch.float64 if precision == torch.float64 else dtype)
        wide = torch.promote_types(precision, torch.float32)
        scale, bias = (part.detach().to(wide).requires_grad_() for part in (scale, bias))
        output = attend(qkv, scale=scale, bias=bias, mask=mask.to(wide) if masked else None)
        weights = torch.linspace(-1, 1, output.numel(), dtype=wide).view_as(output)
        gradients = torch.autograd.grad((output.to(wide) * weights).sum(), (qkv, scale, bias))
        results.append([output.detach(), *gradients])
    for expected, found in zip(*results, strict=True):
        difference = (found.double() - expected).norm() / expected.norm()
        assert difference <= tolerance


def test_gradients_equal_finite_differences() -> None:
    qkv, scale, bias, mask = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *parts: fused_attention(parts[0], scale=parts[1], bias=parts[2], mask=mask),
        (qkv[:1, :1], scale, bias),
        fast_mode=True,
        check_undefined_grad=False,
    )


def test_the_mask_operator_equals_the_mask() -> None:
    grid = window_grid((7, 5), (4, 4), shifted=True)
    regions = window_regions(grid, CPU)
    operator = torch.ops.swinv2.region_mask
    assert torch.equal(operator(regions, ACROSS_REGIONS, PADDING), window_mask(grid, CPU))
    torch.library.opcheck(operator, (regions, ACROSS_REGIONS, PADDING))
