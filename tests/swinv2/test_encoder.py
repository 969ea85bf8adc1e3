from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinv2 import SwinV2, build_encoder, variant_config

SMALL: dict[str, Any] = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


def small_encoder(**overrides: Any) -> SwinV2:
    torch.manual_seed(0)
    return build_encoder("tiny", **{**SMALL, **overrides})


@pytest.mark.parametrize(
    ("name", "with_head"),
    [
        ("tiny", 28.35),
        ("small", 49.73),
        ("base", 87.92),
        ("large", 196.74),
        ("huge", 658.04),
        ("giant", 3001.9),
    ],
)
def test_parameter_counts_with_a_head_of_1000_classes(name: str, with_head: float) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    head = 1000 * encoder.num_features + 1000
    assert (count + head) / 1e6 == pytest.approx(with_head, abs=0.05)
    assert all(parameter.is_meta for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ({"image_size": 64, "window_size": 4}, (3, 64, 64)),
        ({"image_size": 256, "window_size": 8}, (3, 200, 312)),
        ({"image_size": (200, 312), "window_size": (7, 12)}, (3, 200, 312)),
        ({"image_size": 192, "window_size": 6}, (3, 97, 131)),
        ({"image_size": 32, "window_size": 4, "patch_size": 2, "in_channels": 1}, (1, 31, 50)),
        ({"image_size": 64, "window_size": 16, "in_channels": 4}, (4, 30, 150)),
        ({"image_size": 256, "window_size": 6, "pretrained_window_sizes": (12, 9, 4, 1)}, None),
        ({"depths": (1, 3, 1, 2), "extra_norm_every": 2}, (3, 90, 61)),
    ],
)
def test_any_input_equals_an_encoder_computed_by_hand(
    overrides: dict[str, Any],
    shape: tuple[int, int, int] | None,
    randomise: Callable[[nn.Module], None],
    encode_by_hand: Callable[..., tuple[list[Tensor], Tensor]],
) -> None:
    encoder = small_encoder(**overrides).double()
    randomise(encoder)
    config = encoder.config
    references = [
        (min(rows, config.window_size[0]), min(columns, config.window_size[1]))
        for rows, columns in config.stage_resolutions
    ]
    references = list(config.pretrained_window_sizes or references)
    images = torch.randn(2, *(shape or (3, 120, 72)), dtype=torch.float64)
    with torch.no_grad():
        maps, encoded = encoder.features(images), encoder(images)
        outputs, last = encode_by_hand(encoder, images[1], references)
    torch.testing.assert_close(encoded[1], last, rtol=1e-9, atol=1e-9)
    for feature_map, expected in zip(maps, [*outputs[:-1], last], strict=True):
        torch.testing.assert_close(feature_map[1].permute(1, 2, 0), expected, rtol=1e-9, atol=1e-9)


def test_features_have_the_documented_strides_and_channels() -> None:
    encoder = small_encoder(image_size=64, window_size=4)
    maps = encoder.features(torch.randn(2, 3, 65, 130))
    assert encoder.strides == (4, 8, 16, 32)
    assert [tuple(one.shape) for one in maps] == [
        (2, 12, 17, 33),
        (2, 24, 9, 17),
        (2, 48, 5, 9),
        (2, 96, 3, 5),
    ]
    assert encoder.num_features == 96


def test_forward_is_embed_then_encode() -> None:
    encoder = small_encoder()
    images = torch.randn(2, 3, 64, 96)
    tokens = encoder.embed(images)
    assert tokens.shape == (2, 16, 24, 12)
    assert torch.equal(encoder(images), encoder.encode(tokens))
    assert torch.equal(encoder(images), encoder.features(images)[-1].permute(0, 2, 3, 1))


def test_encode_does_not_change_its_input(randomise: Callable[[nn.Module], None]) -> None:
    encoder = small_encoder()
    randomise(encoder)
    tokens = torch.randn(1, 16, 16, 12)
    before = tokens.clone()
    with torch.no_grad():
        encoder.encode(tokens)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("size", [(64, 64), (50, 78)])
def test_gradients_reach_every_parameter(
    size: tuple[int, int], randomise: Callable[[nn.Module], None]
) -> None:
    encoder = small_encoder(window_size=4, extra_norm_every=2, drop_path=0.1)
    randomise(encoder)
    images = torch.randn(4, 3, *size)
    sum(one.square().mean() for one in encoder.features(images)).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_same_seed_gives_the_same_encoder_and_output() -> None:
    images = torch.randn(2, 3, 64, 64)
    first, second = small_encoder(), small_encoder()
    assert torch.equal(first(images), second(images))
    assert torch.equal(first(images), first(images))


def test_fresh_weights_are_drawn_as_published() -> None:
    encoder = build_encoder("tiny", depths=(2, 2, 2, 2))
    for name, parameter in encoder.named_parameters():
        if "norm1" in name or "norm2" in name:
            assert not parameter.any(), name
        elif "logit_scale" in name:
            assert parameter.exp().tolist() == pytest.approx([10] * len(parameter)), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif "patch_embed.projection" in name:
            continue
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_the_state_dict_has_learned_tensors_only() -> None:
    encoder = small_encoder(window_size=4)
    encoder(torch.randn(1, 3, 50, 70))
    learned = {name for name, _ in encoder.named_parameters()}
    assert set(encoder.state_dict()) == learned


def test_weights_load_into_an_encoder_of_another_size() -> None:
    trained = small_encoder(image_size=192, window_size=12)
    with torch.device("meta"):
        encoder = small_encoder(image_size=192, window_size=12)
    encoder.to_empty(device="cpu").load_state_dict(trained.state_dict())
    images = torch.randn(1, 3, 100, 60)
    assert torch.equal(encoder(images), trained(images))


@pytest.mark.parametrize("size", [(200, 312), (64, 64)])
def test_another_input_size_equals_an_encoder_built_for_it(
    size: tuple[int, int], randomise: Callable[[nn.Module], None]
) -> None:
    windows = (12, 12, 12, 6)
    usual = small_encoder(image_size=192, window_size=12, pretrained_window_sizes=windows)
    fitted = small_encoder(image_size=size, window_size=12, pretrained_window_sizes=windows)
    randomise(usual)
    fitted.load_state_dict(usual.state_dict())
    images = torch.randn(1, 3, *size)
    assert torch.equal(usual(images), fitted(images))


def test_set_input_records_the_first_windows(
    randomise: Callable[[nn.Module], None],
) -> None:
    encoder = small_encoder(image_size=192, window_size=12)
    randomise(encoder)
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.set_input()
    assert encoder.config.pretrained_window_sizes is None
    encoder.set_input(image_size=256)
    encoder.set_input(window_size=16)
    assert encoder.config.pretrained_window_sizes == ((12, 12), (12, 12), (12, 12), (6, 6))
    assert encoder.config.image_size == (256, 256)
    assert encoder.config.window_size == (16, 16)
    built = build_encoder(encoder.config)
    built.load_state_dict(weights)
    images = torch.randn(1, 3, 256, 256)
    assert torch.equal(encoder(images), built(images))
    with pytest.raises(ValueError, match="window_size is 0"):
        encoder.set_input(window_size=0)
    assert encoder.config.window_size == (16, 16)


@pytest.mark.parametrize("size", [(128, 128), (90, 150)])
def test_bfloat16_is_close_to_double_precision(
    size: tuple[int, int], randomise: Callable[[nn.Module], None]
) -> None:
    encoder = small_encoder(image_size=128, embed_dim=32, num_heads=(1, 2, 4, 8))
    randomise(encoder)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(images)
        exact = encoder.double()(images.double())
    assert (rounded.double() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_whole_encoder_can_change_precision(dtype: torch.dtype) -> None:
    encoder = small_encoder().to(dtype)
    assert encoder(torch.randn(1, 3, 70, 64, dtype=dtype)).dtype == dtype


def test_misuse_is_explained() -> None:
    encoder = small_encoder()
    with pytest.raises(ValueError, match=r"images have shape \(1, 4, 64, 64\).*in_channels"):
        encoder(torch.randn(1, 4, 64, 64))
    with pytest.raises(ValueError, match="images have shape"):
        encoder(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match=r"images are torch\.uint8.*floating point"):
        encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="tokens have shape"):
        encoder.encode(torch.randn(1, 12, 16, 16))
    with pytest.raises(ValueError, match="did you mean"):
        build_encoder("tiny", image_sise=64)
    with pytest.raises(ValueError, match="did you mean"):
        build_encoder(variant_config("tiny"), dept=2)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("patch_embed.norm.weight", 0),
        ("stages.0.blocks.0.norm1.weight", 1),
        ("stages.1.blocks.1.norm1.weight", 4),
        ("merges.0.norm.weight", 2),
        ("merges.2.norm.weight", 22),
        ("stages.2.extra_norms.0.weight", 10),
        ("stages.2.extra_norms.2.weight", 22),
        ("stages.3.blocks.1.norm2.bias", 24),
        ("norm.weight", 25),
    ],
)
def test_layers_of_parameters(name: str, layer: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder("huge", image_size=192, window_size=12)
    assert encoder.num_layers == 26
    assert name in dict(encoder.named_parameters())
    assert encoder.layer_of(name) == layer


def test_extra_norms_have_the_layer_of_the_block_before_them() -> None:
    encoder = build_encoder(
        "tiny", image_size=32, window_size=4, embed_dim=8, depths=(4, 1), num_heads=(1, 1),
        extra_norm_every=2,
    )  # fmt: skip
    assert [encoder.layer_of(f"stages.0.extra_norms.{k}.weight") for k in (0, 1)] == [2, 4]


def test_a_name_without_a_layer_is_refused() -> None:
    encoder = build_encoder(
        "tiny", image_size=32, window_size=4, embed_dim=8, depths=(1,), num_heads=(1,)
    )
    with pytest.raises(ValueError, match=r"SwinV2 has no parameter stages\.0\.gates\.0\.weight"):
        encoder.layer_of("stages.0.gates.0.weight")
