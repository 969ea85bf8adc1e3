"""The encoder and SimMIM equal transformers' independent implementation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinv2 import SwinV2, SwinV2Config, build_encoder
from swinv2.bridges.transformers import (
    MaskedImageHead,
    to_transformers,
    to_transformers_masked,
    transformers_config,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TRANSFERRED = ((12, 12), (12, 12), (12, 12), (6, 6))
INPUTS = [(256, 8, None), (256, 16, None), (192, 12, None), (256, 16, TRANSFERRED)]
inputs = pytest.mark.parametrize(
    ("image_size", "window_size", "pretrained"),
    INPUTS,
    ids=["256-w8", "256-w16", "192-w12", "256-w16-from-w12"],
)

EXECUTIONS: list[dict[str, Any]] = [
    {},
    {"attention": "explicit"},
    {"attention": "sdpa"},
    {"attention": "sequential", "scores_at_a_time": 1},
    {"checkpointing": "attention"},
    {"checkpointing": "full"},
    {"compile": True},
]


COMPILING = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, by torch
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo looks at it
]


@pytest.fixture(
    params=[
        pytest.param(one, id=str(one or "default"), marks=COMPILING if "compile" in one else ())
        for one in EXECUTIONS
    ]
)
def execution(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How the encoder computes: it equals its peer however it does."""
    chosen: dict[str, Any] = request.param
    return chosen


def executed(encoder: SwinV2, execution: dict[str, Any]) -> SwinV2:
    if "compile" in execution:
        torch._dynamo.reset()
        encoder.compile_blocks()
    else:
        encoder.set_execution(**execution)
    return encoder


# Their position tables are float32 whatever the weights are: that leaves about 1e-8 in double.
IN_DOUBLE = 1e-6
IN_SINGLE = 1e-5


def small_encoder(
    image_size: int, window_size: int, pretrained: tuple[tuple[int, int], ...] | None
) -> SwinV2:
    return SwinV2(
        SwinV2Config(
            embed_dim=16,
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 4, 8),
            image_size=image_size,
            window_size=window_size,
            pretrained_window_sizes=pretrained,
        )
    )


def peer_of(encoder: SwinV2) -> nn.Module:
    config = transformers.Swinv2Config(**transformers_config(encoder))
    peer = transformers.Swinv2Model(config).to(encoder.norm.weight.dtype)
    peer.load_state_dict(to_transformers(encoder))
    return peer.eval()


def draw_images(encoder: SwinV2, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, encoder.config.in_channels, *encoder.config.image_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(
        encoder.norm.weight.dtype
    )


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def gradients(encoder: SwinV2) -> dict[str, Tensor]:
    """Gradients of the encoder's parameters under transformers' names."""
    shell = SwinV2(encoder.config).to(encoder.norm.weight.dtype)
    gradient_of = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert all(gradient is not None for gradient in gradient_of.values())
    shell.load_state_dict(gradient_of)
    return to_transformers(shell)


@inputs
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, IN_DOUBLE), (torch.float32, IN_SINGLE)]
)
def test_features_of_every_stage_are_equal(
    randomise: Callable[[nn.Module], None],
    execution: dict[str, Any],
    image_size: int,
    window_size: int,
    pretrained: tuple[tuple[int, int], ...] | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    encoder = small_encoder(image_size, window_size, pretrained).to(dtype).eval()
    randomise(encoder)
    executed(encoder, execution)
    images = draw_images(encoder)
    config = transformers.Swinv2Config(
        **transformers_config(encoder), out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    backbone = transformers.Swinv2Backbone(config).to(dtype).eval()
    tensors = to_transformers(encoder)
    final = nn.LayerNorm(encoder.num_features, dtype=dtype)
    final.load_state_dict({part: tensors.pop(f"layernorm.{part}") for part in ("weight", "bias")})
    backbone.load_state_dict(tensors)

    with torch.no_grad():
        ours = encoder.features(images)
        theirs = list(backbone(images).feature_maps)
        theirs[-1] = final(theirs[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result = peer_of(encoder)(images).last_hidden_state
    for stage, (our_map, their_map) in enumerate(zip(ours, theirs, strict=True)):
        assert our_map.shape == their_map.shape
        assert error(our_map, their_map) <= tolerance, f"stage {stage + 1}"
    assert error(encoder(images).flatten(1, 2), result) <= tolerance


@inputs
def test_gradients_of_every_parameter_are_equal(
    randomise: Callable[[nn.Module], None],
    execution: dict[str, Any],
    image_size: int,
    window_size: int,
    pretrained: tuple[tuple[int, int], ...] | None,
) -> None:
    encoder = small_encoder(image_size, window_size, pretrained).double()
    randomise(encoder)
    peer = peer_of(encoder)
    executed(encoder, execution)
    images = draw_images(encoder, batch=1).requires_grad_()
    peer_images = images.detach().clone().requires_grad_()

    features = encoder(images).flatten(1, 2)
    weight = torch.randn(
        features.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    (features * weight).sum().backward()
    (peer(peer_images).last_hidden_state * weight).sum().backward()

    ours = gradients(encoder)
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert ours.keys() == theirs.keys()
    errors = {name: error(ours[name], theirs[name]) for name in ours}
    assert max(errors.values()) <= IN_DOUBLE, max(errors, key=lambda name: errors[name])
    assert images.grad is not None
    assert error(images.grad, peer_images.grad) <= IN_DOUBLE


def test_published_tiny_is_equal(randomise: Callable[[nn.Module], None]) -> None:
    encoder = build_encoder("tiny", image_size=256, window_size=8).double().eval()
    randomise(encoder)
    images = draw_images(encoder, batch=1)
    with torch.no_grad():
        assert (
            error(encoder(images).flatten(1, 2), peer_of(encoder)(images).last_hidden_state)
            <= IN_DOUBLE
        )


@inputs
def test_simmim_loss_and_its_gradients_are_equal(
    randomise: Callable[[nn.Module], None],
    execution: dict[str, Any],
    image_size: int,
    window_size: int,
    pretrained: tuple[tuple[int, int], ...] | None,
) -> None:
    simmim = pytest.importorskip("simmim.method.model")
    encoder = small_encoder(image_size, window_size, pretrained)
    model = simmim.SimMIM(encoder, mask_cell=32).double()
    randomise(model)
    executed(encoder, execution)
    head = MaskedImageHead(
        mask_token=model.mask_token,
        weight=model.decoder.projection.weight,
        bias=model.decoder.projection.bias,
    )
    peer = transformers.Swinv2ForMaskedImageModeling(
        transformers.Swinv2Config(**transformers_config(encoder))
    ).double()
    peer.load_state_dict(to_transformers_masked(encoder, head))
    peer.eval()

    images = draw_images(encoder)
    cells = image_size // 32
    mask = torch.rand(2, cells, cells, generator=torch.Generator().manual_seed(3)) < 0.6
    tokens_hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)

    ours = model(images, mask)
    theirs = peer(images, bool_masked_pos=tokens_hidden)
    assert abs(ours.loss - theirs.loss).item() <= IN_DOUBLE * abs(theirs.loss).item()
    assert error(ours.reconstruction, theirs.reconstruction) <= IN_DOUBLE
    ours.loss.backward()
    theirs.loss.backward()
    decoder = model.decoder.projection
    assert error(decoder.weight.grad, peer.decoder[0].weight.grad) <= IN_DOUBLE
    assert error(decoder.bias.grad, peer.decoder[0].bias.grad) <= IN_DOUBLE
    their_token = peer.swinv2.embeddings.mask_token.grad
    assert error(model.mask_token.grad.flatten(), their_token.flatten()) <= IN_DOUBLE
    for name, gradient in gradients(encoder).items():
        assert error(gradient, peer.swinv2.get_parameter(name).grad) <= IN_DOUBLE, name


@inputs
def test_bfloat16_is_close_to_double_precision(
    randomise: Callable[[nn.Module], None],
    execution: dict[str, Any],
    image_size: int,
    window_size: int,
    pretrained: tuple[tuple[int, int], ...] | None,
) -> None:
    encoder = small_encoder(image_size, window_size, pretrained).eval()
    randomise(encoder)
    executed(encoder, execution)
    images = draw_images(encoder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = encoder.features(images)
    precise = encoder.double()
    with torch.no_grad():
        exact = precise.features(images.double())
    for our_map, exact_map in zip(rounded, exact, strict=True):
        assert error(our_map.double(), exact_map) <= 2e-2
