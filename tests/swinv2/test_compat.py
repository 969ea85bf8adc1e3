"""The private names that the encoder uses still do what it uses them for."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from swinv2 import compat


@pytest.mark.skipif(not compat.HAS_LINEAR_POINTWISE, reason="torch without oneDNN")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_a_linear_layer(dtype: torch.dtype, *, with_bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, 8, generator=random).to(dtype) for size in (5, 3))
    bias = torch.randn(3, generator=random).to(dtype) if with_bias else None
    product = compat.onednn_linear(rows, weight, bias)
    torch.testing.assert_close(product, F.linear(rows, weight, bias))


def test_the_gradient_of_a_softmax_is_written_in_place() -> None:
    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = scores.softmax(-1)
    gradient = torch.randn(2, 3, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(weights, scores, gradient)
    compat.softmax_backward_in_place(gradient, weights.detach())
    torch.testing.assert_close(gradient, expected)


def test_a_dispatch_mode_is_noticed() -> None:
    assert not compat.in_dispatch_mode()
    with FlopCounterMode(display=False):
        assert compat.in_dispatch_mode()
    assert not compat.in_dispatch_mode()


def test_a_copied_function_computes_the_same_under_its_own_name() -> None:
    def add(first: int, second: int) -> int:
        return first + second

    copy = compat.copied_function(add, "add_1")
    assert copy(1, 2) == 3
    assert copy.__code__ is not add.__code__
    assert copy.__code__.co_name == "add_1"


def test_copied_functions_do_not_share_compiled_graphs() -> None:
    """Each copy compiles once, for its own shape; calls of one function would see two shapes."""
    graphs: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(tuple(inputs[-1].shape))
        return graph

    def double(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    for length in (3, 4):
        compiled = torch.compile(
            compat.copied_function(double, f"double_{length}"), backend=backend
        )
        compiled(torch.ones(length))
    assert graphs == [(3,), (4,)]  # neither length has become dynamic


def test_a_dynamic_length_may_be_1_in_an_export() -> None:
    class Double(torch.nn.Module):
        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor])

    length = torch.export.Dim("length", min=1)
    with compat.lengths_of_one_allowed():
        program = torch.export.export(
            Double(), (torch.ones(3),), dynamic_shapes=({0: length},), strict=False
        )
    assert program.module()(torch.ones(1)).tolist() == [1, 1]


def test_the_refusal_of_an_export_is_known() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor * 2 if len(tensor) == 3 else tensor

    with pytest.raises(Exception, match="length") as refused:
        torch.export.export(
            Fixed(), (torch.ones(3),), dynamic_shapes=({0: torch.export.Dim("length")},)
        )
    assert compat.export_is_refused(refused.value)
    assert not compat.export_is_refused(ValueError("length"))
