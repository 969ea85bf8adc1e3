"""Frozen stages: the same output, no gradients, no drop path, no graph."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from swinv2 import SwinV2, SwinV2Config

STAGES: list[int | Literal["all"]] = [1, 2, 3, "all"]


@pytest.fixture
def encoder(randomise: Callable[[nn.Module], None]) -> SwinV2:
    config = SwinV2Config(
        embed_dim=8,
        depths=(2, 2, 1),
        num_heads=(1, 2, 4),
        image_size=32,
        window_size=4,
        drop_path=0.5,
        extra_norm_every=2,
    )
    built = SwinV2(config)
    randomise(built)
    return built.train()


def draw_images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def draw_noise(encoder: SwinV2, kept_blocks: int) -> Tensor:
    """Noise that drops both branches of the first blocks, of the rest of the second image only."""
    noise = torch.zeros(2, len(encoder.blocks), 2, dtype=torch.int32)
    noise[:, kept_blocks:] = 2**31 - 1
    noise[1] = 0
    return noise


def frozen_names(encoder: SwinV2, stages: int | str) -> set[str]:
    """Names of the weights that a person would expect to be frozen."""
    names = set(dict(encoder.named_parameters()))
    if stages == "all":
        return names
    prefixes = ["patch_embed."]
    prefixes += [
        f"{kind}.{index}." for index in range(int(stages)) for kind in ("stages", "merges")
    ]
    return {name for name in names if name.startswith(tuple(prefixes))}


@pytest.mark.parametrize("stages", STAGES)
def test_frozen_weights_have_no_gradients(encoder: SwinV2, stages: int | Literal["all"]) -> None:
    encoder.freeze(stages)
    expected = frozen_names(encoder, stages)
    found = {name for name, one in encoder.named_parameters() if not one.requires_grad}
    assert found == expected
    output = encoder(draw_images())
    assert output.requires_grad == (stages != "all")
    if stages == "all":
        return
    output.square().sum().backward()
    with_gradient = {name for name, one in encoder.named_parameters() if one.grad is not None}
    assert with_gradient == set(dict(encoder.named_parameters())) - expected


@pytest.mark.parametrize("stages", STAGES)
def test_frozen_parts_stay_in_evaluation_mode(
    encoder: SwinV2, stages: int | Literal["all"]
) -> None:
    encoder.freeze(stages)
    nn.Sequential(encoder).train()
    number = len(encoder.stages) if stages == "all" else stages
    for index, stage in enumerate(encoder.stages):
        modes = {module.training for module in stage.modules()}
        assert modes == {index >= number}
    assert not encoder.patch_embed.norm.training
    assert encoder.norm.training == (stages != "all")
    assert encoder.training == (stages != "all")


@pytest.mark.parametrize(
    "execution", [{}, {"checkpointing": "full"}, {"checkpointing": "attention"}]
)
@pytest.mark.parametrize("stages", [1, 2])
def test_gradients_of_the_rest_equal_those_without_freezing(
    encoder: SwinV2, stages: int, execution: dict[str, Any]
) -> None:
    # Without freezing, drop path is off in the first stages, and as the noise says in others.
    blocks = sum(encoder.config.depths[:stages])
    for block in encoder.blocks[:blocks]:
        block.drop_path = 0.0
    noise = draw_noise(encoder, blocks)
    expected = encoder.encode(encoder.embed(draw_images()), noise)
    expected.square().sum().backward()
    wanted = {
        name: one.grad
        for name, one in encoder.named_parameters()
        if name not in frozen_names(encoder, stages)
    }
    encoder.zero_grad()
    for block in encoder.blocks[:blocks]:
        block.drop_path = 0.5
    encoder.set_execution(**execution)
    encoder.freeze(stages)
    found = encoder.encode(encoder.embed(draw_images()), noise)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(dict(encoder.named_parameters())[name].grad, gradient)


def test_a_frozen_encoder_keeps_no_activations(encoder: SwinV2) -> None:
    def saved() -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = encoder.features(draw_images())
        del outputs
        return sum(sizes)

    trained = saved()
    encoder.freeze(1)
    assert 0 < saved() < trained / 1.5
    encoder.freeze("all")
    assert saved() == 0


def test_freezing_is_undone_and_checked(encoder: SwinV2) -> None:
    encoder.freeze("all")
    encoder.freeze(0)
    assert all(one.requires_grad for one in encoder.parameters())
    assert all(module.training for module in encoder.train().modules())
    with pytest.raises(ValueError, match=r"freeze is 4, and the encoder has 3 stages: .*or all"):
        encoder.freeze(4)
