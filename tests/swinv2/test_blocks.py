from collections.abc import Callable

import pytest
import torch
from torch import nn

from swinv2 import build_encoder
from swinv2.blocks import (
    NOISE_RANGE,
    PatchEmbed,
    PatchMerging,
    Stage,
    drop_path_factor,
)

TINY = {"image_size": 32, "window_size": 4, "embed_dim": 12, "num_heads": (1, 2), "patch_size": 2}


def test_a_fresh_block_is_the_identity() -> None:
    encoder = build_encoder("tiny", **TINY, depths=(2, 3), drop_path=0.3)
    for index, stage in enumerate(encoder.stages):
        tokens = torch.randn(2, 9, 7, 12 * 2**index)
        for block in stage.blocks:
            assert torch.equal(block(tokens), tokens)
            assert not block.norm1.weight.any()
            assert not block.norm2.bias.any()


def test_extra_norms_follow_every_sixth_block_of_a_stage() -> None:
    encoder = build_encoder("tiny", **TINY, depths=(5, 13), extra_norm_every=6)
    assert [len(stage.extra_norms) for stage in encoder.stages] == [0, 2]
    calls: list[str] = []
    stage = encoder.stages[1]
    for name, module in stage.named_modules():
        if name.startswith("extra_norms.") or name.count(".") == 1:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    stage(torch.randn(1, 4, 4, 24))
    blocks = [f"blocks.{index}" for index in range(13)]
    assert calls == [*blocks[:6], "extra_norms.0", *blocks[6:12], "extra_norms.1", blocks[12]]


def test_extra_norms_are_on_the_main_branch() -> None:
    stage = Stage([], 8, extra_norm_every=0)
    assert not list(stage.extra_norms)
    encoder = build_encoder("tiny", **TINY, depths=(1, 1), extra_norm_every=1)
    tokens = 5 + 3 * torch.randn(1, 4, 4, 12)
    out = encoder.stages[0](tokens)
    torch.testing.assert_close(out, nn.functional.layer_norm(tokens, (12,)))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    branch = torch.ones(20_000, 2, 3)
    factor = drop_path_factor(branch, 0.3, training=True)
    assert factor is not None
    dropped = branch * factor
    values = dropped[:, 0, 0]
    assert torch.equal(dropped, values[:, None, None].expand_as(dropped))
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (values == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert values.mean() == pytest.approx(1, abs=0.02)


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_0() -> None:
    branch = torch.randn(4, 2)
    assert drop_path_factor(branch, 0.5, training=False) is None
    assert drop_path_factor(branch, 0.0, training=True) is None


def test_drop_path_rises_linearly_over_all_blocks() -> None:
    encoder = build_encoder("tiny", **TINY, depths=(2, 3), drop_path=0.2)
    rates = [block.drop_path for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_acts_in_training_only(randomise: Callable[[nn.Module], None]) -> None:
    encoder = build_encoder("tiny", **TINY, depths=(1, 2), drop_path=0.9)
    randomise(encoder)
    images = torch.randn(1, 3, 32, 32).expand(16, 3, 32, 32)
    torch.manual_seed(0)
    assert len(encoder(images).sum((1, 2, 3)).unique()) > 1
    assert len(encoder.eval()(images).sum((1, 2, 3)).unique()) == 1


def test_drop_path_with_noise_does_not_depend_on_the_batch(
    randomise: Callable[[nn.Module], None],
) -> None:
    encoder = build_encoder("tiny", **TINY, depths=(1, 2), drop_path=0.6)
    randomise(encoder)
    images = torch.randn(1, 3, 32, 32).expand(12, 3, 32, 32)
    noise = torch.randint(NOISE_RANGE, (12, 3, 2), dtype=torch.int32)
    whole = encoder(images, noise)
    assert len(whole.sum((1, 2, 3)).unique()) > 1
    parts = [encoder(images[part], noise[part]) for part in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(torch.cat(parts), whole)
    encoder.set_execution(checkpointing="full")
    torch.testing.assert_close(encoder(images, noise), whole)
    with pytest.raises(ValueError, match=r"drop_path_noise has shape \(12, 2, 2\)"):
        encoder(images, noise[:, :2])


def test_drop_path_with_noise_drops_at_the_rate() -> None:
    branch = torch.ones(20_000, 2)
    noise = torch.randint(NOISE_RANGE, (20_000,), dtype=torch.int32)
    factors = drop_path_factor(branch, 0.3, training=True, noise=noise)
    assert factors is not None
    assert (factors == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert factors.mean() == pytest.approx(1, abs=0.02)


def test_images_are_padded_to_whole_patches() -> None:
    embed = PatchEmbed(4, 3, 8)
    images = torch.randn(1, 3, 9, 14)
    padded = torch.zeros(1, 3, 12, 16)
    padded[:, :, :9, :14] = images
    assert embed(images).shape == (1, 3, 4, 8)
    assert torch.equal(embed(images), embed(padded))


def test_merging_pads_odd_maps() -> None:
    merging = PatchMerging(4)
    tokens = torch.randn(2, 5, 3, 4)
    padded = torch.zeros(2, 6, 4, 4)
    padded[:, :5, :3] = tokens
    assert merging(tokens).shape == (2, 3, 2, 8)
    assert torch.equal(merging(tokens), merging(padded))
