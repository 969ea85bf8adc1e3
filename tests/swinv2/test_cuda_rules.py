"""Under CUDA's rules of autocast the encoder computes what it computes on a CPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swinv2 import SwinV2, build_encoder
from swinv2.kernels.precision import LayerNorm
from swinv2.kernels.sequential import attend, attend_backward
from tests.swinv2.cuda_rules import cuda_autocast, fake_cuda

SIZES: dict[str, Any] = {
    "image_size": 64,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (2, 2),
    "num_heads": (2, 4),
}
PATHS = ["auto", "explicit", "sdpa", "sequential"]
LOW = [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
PADDED = (50, 78)
"""Image size with which the last windows of each stage are padded."""


@pytest.fixture
def encoder(randomise: Callable[[nn.Module], None]) -> SwinV2:
    encoder = build_encoder("tiny", **SIZES)
    randomise(encoder)
    return encoder


class Recorder(TorchFunctionMode):
    """Note the types that functions of lengths and of scores are given."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {"lengths": set(), "scores": set()}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kinds = {"clamp_min": "lengths", "clamp_min_": "lengths", "softmax": "scores"}
        kind = kinds.get(getattr(function, "__name__", ""))
        if kind is not None:
            self.types[kind].add(args[0].dtype)
        return function(*args, **kwargs or {})


def functions() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "mv": lambda x: torch.mv(x, x[0]),
        "mm": lambda x: x @ x,
        "bmm": lambda x: torch.bmm(x[None], x[None]),
        "bmm, out": lambda x: torch.bmm(x[None], x[None], out=torch.empty_like(x)[None]),
        "linear": lambda x: F.linear(x, x),
        "layer_norm": lambda x: F.layer_norm(x, (4,)),
        "softmax": lambda x: x.softmax(-1),
        "exp": torch.exp,
        "rsqrt": torch.rsqrt,
        "sum": lambda x: x.sum(-1),
        "gelu": F.gelu,
        "add": lambda x: x + x,
    }


@pytest.mark.parametrize("given", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", functions())
def test_emulated_rules_are_those_of_pytorch(name: str, given: torch.dtype) -> None:
    function = functions()[name]
    with cuda_autocast(torch.float16):
        found = function(torch.ones(4, 4, dtype=given)).dtype
    with fake_cuda(nn.Identity(), torch.float16):
        expected = function(torch.ones(4, 4, dtype=given, device="cuda")).dtype
    assert found == expected


@pytest.mark.parametrize(("dtype", "_tolerance"), LOW, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_lengths_and_scores_are_float32_and_the_main_branch_is_not(
    encoder: SwinV2,
    path: Any,
    dtype: torch.dtype,
    _tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swinv2.kernels.sequential.use_operators", lambda: False)
    encoder.set_execution(attention=path)
    branch = []
    for module in encoder.modules():
        if isinstance(module, LayerNorm) or module in encoder.blocks:
            module.register_forward_hook(lambda _module, _input, out: branch.append(out.dtype))
    with fake_cuda(encoder.eval(), dtype), Recorder() as recorder:
        assert encoder(torch.empty(2, 3, *PADDED, device="cuda")).dtype == dtype
    assert recorder.types["lengths"] == {torch.float32}
    assert recorder.types["scores"] == (set() if path == "sdpa" else {torch.float32})
    assert set(branch) == {dtype}
    assert len(branch) == 1 + 3 * 4 + 1 + 1


@pytest.mark.parametrize(("dtype", "tolerance"), LOW, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_features_and_gradients_are_those_of_double_precision(
    encoder: SwinV2, path: Any, dtype: torch.dtype, tolerance: float
) -> None:
    images = torch.randn(2, 3, *PADDED, generator=torch.Generator().manual_seed(1))
    exact = features_and_gradients(copy.deepcopy(encoder).double(), images.double())
    encoder.set_execution(attention=path)
    with cuda_autocast(dtype):
        rounded = features_and_gradients(encoder, images)
    assert relative_error(rounded[0], exact[0]) < tolerance
    assert relative_error(rounded[1], exact[1]) < 3 * tolerance


def features_and_gradients(encoder: SwinV2, images: Tensor) -> tuple[Tensor, Tensor]:
    features = encoder(images)
    features.to(images.dtype).square().mean().backward()
    gradients = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
    return features.detach(), torch.cat(gradients)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operators_compute_outside_of_autocast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 2, 4, 3 * 8, generator=generator).to(dtype)
    qkv[:, :, -1] = 0  # a padding token without a bias: its length is 0
    scale, bias = torch.full((2, 1, 1), 10.0), torch.randn(2, 4, 4, generator=generator)
    expected, weights = attend(qkv, scale, bias, None, None, True)
    gradient = torch.ones_like(expected)
    gradients = attend_backward(gradient, qkv, scale, bias, None, weights, None)
    with cuda_autocast(dtype):
        found, _ = attend(qkv, scale, bias, None, None, True)
        again = attend_backward(gradient, qkv, scale, bias, None, weights, None)
    assert found.isfinite().all()
    assert torch.equal(found, expected)
    assert all(torch.equal(*pair) for pair in zip(again, gradients, strict=True))


@pytest.mark.parametrize("path", ["auto", "sdpa"])
def test_a_compiled_block_makes_no_tables(path: Any) -> None:
    """In its graph nothing is on the CPU, and no table is made from sizes."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    encoder = build_encoder("tiny", **SIZES | {"depths": (2,), "num_heads": (2,)})
    encoder.set_execution(attention=path)
    encoder.to("meta", torch.bfloat16).compile_blocks(backend=keep)
    with torch.no_grad():
        encoder(torch.empty(1, 3, *PADDED, device="meta", dtype=torch.bfloat16))
    assert len(graphs) == 2
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    values = [node.meta["example_value"] for node in nodes if "example_value" in node.meta]
    tensors = [value for value in values if isinstance(value, Tensor)]
    assert len(tensors) > 50
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    made = {"arange", "cartesian_prod", "log2", "linspace"}
    assert not made & {getattr(node.target, "__name__", str(node.target)) for node in nodes}


def test_sdpa_never_takes_the_kernel_of_cudnn(
    encoder: SwinV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled = []
    attend = F.scaled_dot_product_attention

    def noted(*args: Tensor, **rest: Any) -> Tensor:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    encoder.set_execution(attention="sdpa")
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with fake_cuda(encoder.eval(), torch.bfloat16):
        encoder(torch.empty(1, 3, *PADDED, device="cuda"))
    assert set(enabled) == {False}
    assert before
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
