"""All execution settings compute the same."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinv2 import Execution, SwinV2, build_encoder, load_encoder, save_encoder
from swinv2.kernels import dispatch
from swinv2.kernels.linear import Linear, linear

SIZES: dict[str, Any] = {
    "image_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
}
EXECUTIONS: list[dict[str, Any]] = [
    {"attention": "sdpa"},
    {"attention": "auto"},
    {"attention": "auto", "scores_at_a_time": 16**2 * 3},
    {"attention": "sequential"},
    {"attention": "sequential", "scores_at_a_time": 1},
    {"attention": "sequential", "scores_at_a_time": 16**2 * 3},
    {"attention": ("sequential", "sequential", "auto", "explicit")},
    {"checkpointing": "attention"},
    {"checkpointing": "full"},
    {"checkpointing": ("full", "attention", "none", "full"), "attention": "explicit"},
]


def outcome(encoder: SwinV2, images: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    torch.manual_seed(3)
    images = images.clone().requires_grad_()
    features = encoder(images)
    features.square().sum().backward()
    assert images.grad is not None
    gradients = {name: one.grad.clone() for name, one in encoder.named_parameters()}
    return {"features": features.detach(), "images": images.grad, **gradients}


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (50, 78)])
def test_features_and_gradients_are_equal(
    execution: dict[str, Any], size: tuple[int, int], randomise: Callable[[nn.Module], None]
) -> None:
    encoder = build_encoder("tiny", **SIZES, drop_path=0.2).double()
    randomise(encoder)
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    encoder.set_execution(attention="explicit")
    expected = outcome(encoder, images)
    encoder.set_execution(**execution)
    found = outcome(encoder, images)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("execution", [{}, *EXECUTIONS], ids=str)
def test_bfloat16_is_close_to_double_precision(
    execution: dict[str, Any], randomise: Callable[[nn.Module], None]
) -> None:
    encoder = build_encoder("tiny", **SIZES | {"embed_dim": 32}).eval()
    randomise(encoder)
    encoder.set_execution(**execution)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images)
    exact = encoder.double()(images.double())
    assert (rounded - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_reproducible_bit_for_bit(
    autocast: bool, randomise: Callable[[nn.Module], None]
) -> None:
    encoder = build_encoder("tiny", **SIZES)
    randomise(encoder)
    images = torch.randn(2, 3, 64, 64)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(outcome(encoder, images))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_checkpointing_saves_fewer_activations() -> None:
    encoder = build_encoder("tiny", **SIZES)
    images = torch.randn(2, 3, 64, 64)

    def kept(**execution: Any) -> int:
        encoder.set_execution(**execution)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(images)
        return sum(sizes.values())

    explicit = kept(attention="explicit")
    sequential = kept(attention="sequential")
    attention = kept(attention="explicit", checkpointing="attention")
    full = kept(attention="explicit", checkpointing="full")
    assert full < attention < explicit
    assert sequential < explicit


def test_impossible_executions_are_explained() -> None:
    encoder = build_encoder("tiny", **SIZES)
    with pytest.raises(ValueError, match="attention is 'fast'; choose auto, explicit, sdpa or"):
        encoder.set_execution(attention="fast")
    with pytest.raises(ValueError, match="one for each of the 4 stages"):
        encoder.set_execution(checkpointing=("full", "none"))
    with pytest.raises(ValueError, match="scores_at_a_time is 0"):
        Execution(scores_at_a_time=0)
    assert encoder.execution == Execution()


def test_the_bias_is_cached_until_its_weights_change() -> None:
    attention = build_encoder("tiny", **SIZES).stages[0].blocks[0].attention
    bias = attention.position_bias
    with torch.inference_mode():
        first = bias((4, 4))
        assert bias((4, 4)) is first
        assert bias((4, 2)).shape == (1, 8, 8)
    assert bias((4, 4)).requires_grad
    bias.reduce.weight.data.add_(1)
    with torch.no_grad():
        assert not torch.equal(bias((4, 4)), first)
        torch.testing.assert_close(bias((4, 4)), bias._compute((4, 4), bias.tables((4, 4))))


def test_off_the_cpu_the_bias_is_cached_in_evaluation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as tensors on a GPU say
    bias = build_encoder("tiny", **SIZES).stages[0].blocks[0].attention.position_bias
    other = {name: tensor + 1 for name, tensor in bias.state_dict().items()}

    def changes() -> Iterator[None]:
        with torch.no_grad():
            bias.reduce.weight.mul_(2)
        yield
        bias.load_state_dict(other)
        yield
        bias.reduce.weight.data = bias.reduce.weight.data * 2
        yield
        bias.train()
        bias.reduce.weight.data.add_(1)  # which version counters miss
        bias.eval()
        yield
        bias.reduce.weight.data.add_(1)
        bias((4, 4)).sum().backward()
        yield

    with torch.no_grad():
        assert bias((4, 4)) is not bias((4, 4))
        bias.eval()
        kept = bias((4, 4))
    for _ in changes():
        with torch.no_grad():
            changed = bias((4, 4))
            assert changed is not kept
            assert torch.equal(changed, bias._compute((4, 4), bias.tables((4, 4))))
            assert bias((4, 4)) is changed
        kept = changed
    with torch.inference_mode():
        assert bias((4, 4)) is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 1500])
def test_linear_equals_torchs(dtype: torch.dtype, rows: int) -> None:
    layer = Linear(24, 40)
    tokens = torch.randn(2, rows, 24, requires_grad=True)
    outcomes = []
    for product in (linear, torch.nn.functional.linear):
        layer.zero_grad()
        tokens.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            mapped = product(tokens, layer.weight, layer.bias)
        mapped.float().square().mean().backward()
        outcomes.append([mapped, tokens.grad, layer.weight.grad, layer.bias.grad])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    empty = linear(torch.randn(0, 24), layer.weight, layer.bias)
    assert empty.shape == (0, 40)


@pytest.mark.parametrize("attention", ["auto", "explicit", "sdpa", "sequential"])
def test_autocast_leaves_double_alone(
    attention: str, randomise: Callable[[nn.Module], None]
) -> None:
    encoder = build_encoder("tiny", **SIZES).double()
    randomise(encoder)
    encoder.set_execution(attention=attention)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(encoder, images)
    for name, tensor in outcome(encoder, images).items():
        assert torch.equal(found[name], tensor), name


SEEN_BY_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.mark.slow
@pytest.mark.timeout(900)
@SEEN_BY_DYNAMO
@pytest.mark.parametrize("drop_path", [0.0, 0.2])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_compiled_blocks_are_equal_with_few_graphs(
    drop_path: float, checkpointing: str, randomise: Callable[[nn.Module], None]
) -> None:
    torch._dynamo.reset()
    sizes = SIZES | {"depths": (2, 6), "num_heads": (1, 2), "embed_dim": 16}
    encoder = build_encoder("tiny", **sizes, drop_path=drop_path)
    encoder.set_execution(checkpointing=checkpointing)
    randomise(encoder)
    images = torch.randn(2, 3, 64, 64)
    expected = outcome(encoder, images)
    names = list(encoder.state_dict())
    torch._dynamo.utils.counters.clear()
    encoder.compile_blocks(backend="aot_eager")
    found = outcome(encoder, images)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= (4 if drop_path == 0 else 5)  # one more for the first, which never drops
    assert list(encoder.state_dict()) == names


@pytest.mark.slow
@pytest.mark.timeout(900)
@SEEN_BY_DYNAMO
def test_stages_do_not_use_up_each_others_graphs(randomise: Callable[[nn.Module], None]) -> None:
    """Four kinds of blocks, in training and evaluation, with batches of several sizes."""
    torch._dynamo.reset()
    encoder = build_encoder("tiny", **SIZES | {"depths": (2, 2), "num_heads": (1, 2)})
    randomise(encoder)
    torch._dynamo.utils.counters.clear()
    encoder.compile_blocks(backend="aot_eager")
    for batch, training in ((2, True), (2, False), (3, False), (5, False), (4, True), (6, True)):
        encoder.train(training)
        with torch.set_grad_enabled(training):
            features = encoder(torch.randn(batch, 3, 64, 64))
            if training:
                features.sum().backward()
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Training and evaluation each have one for the first batch and one for all others: more than
    # the eight that torch allows one piece of code.
    assert 8 < counters["stats"]["unique_graphs"] <= 4 * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@SEEN_BY_DYNAMO
def test_a_compiled_encoder_is_copied_saved_and_exported(
    tmp_path: Path, randomise: Callable[[nn.Module], None]
) -> None:
    torch._dynamo.reset()
    encoder = build_encoder("tiny", **SIZES).eval()
    randomise(encoder)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(images)
        encoder.compile_blocks(backend="aot_eager")
        torch.testing.assert_close(encoder(images), expected)

        save_encoder(encoder, tmp_path / "encoder", mean=(0.5,) * 3, std=(0.5,) * 3)
        loaded = load_encoder(tmp_path / "encoder")
        assert loaded.state_dict().keys() == encoder.state_dict().keys()
        torch.testing.assert_close(loaded(images), expected)

        copied = copy.deepcopy(encoder)
        for parameter in encoder.parameters():
            parameter.zero_()
        torch.testing.assert_close(copied(images), expected)  # its weights are a copy

        program = torch.export.export(copied, (images,)).module()
        torch.testing.assert_close(program(images), expected)
        encoder.load_state_dict(program.state_dict())
        torch.testing.assert_close(encoder(images), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # that sizes are constants
@pytest.mark.parametrize("grad", [False, True])
def test_a_loaded_encoder_passes_the_check_of_torch_jit_trace(
    randomise: Callable[[nn.Module], None], tmp_path: Path, grad: bool
) -> None:
    encoder = build_encoder("tiny", **SIZES)
    randomise(encoder)
    save_encoder(encoder, tmp_path / "encoder", mean=(0.5,) * 3, std=(0.5,) * 3)
    loaded = load_encoder(tmp_path / "encoder")
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(loaded, torch.randn(1, 3, 62, 86), check_trace=True)
        images = torch.randn(3, 3, 62, 86)
        torch.testing.assert_close(traced(images), loaded(images), rtol=1e-4, atol=1e-5)


def test_compiling_is_not_exporting() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda tensor: tensor + (1 if dispatch.is_exporting() else 2), backend="eager"
    )
    assert compiled(torch.zeros(())) == 2
