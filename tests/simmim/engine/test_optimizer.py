import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from simmim import SimMIM
from simmim.engine.optimizer import (
    Layers,
    OptimizerSettings,
    build_optimizer,
    layer_table,
    parameter_groups,
    set_learning_rate,
    step_if_finite,
)
from swinv2 import VARIANTS, build_encoder


class Classifier(nn.Module):
    """An encoder with a head, as fine-tuning has it."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, 10)


def tiny_model() -> SimMIM:
    torch.manual_seed(0)
    encoder = build_encoder(
        "tiny", image_size=32, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2)
    )
    return SimMIM(encoder, mask_cell=8)


def layers_by_module(model: SimMIM) -> Iterator[tuple[nn.Parameter, int]]:
    """Count layers as SimMIM's fine-tuning code does, along the modules instead of the names.

    Patch embedding and mask token 0; block after block 1, 2, …; a merging counts with the block
    before it; all the rest one more than the last block. An extra norm, which that code does not
    have, counts with the block it follows.
    """
    encoder = model.encoder
    counted: set[nn.Parameter] = set()
    count = 0
    places: list[tuple[nn.Module, int]] = [(encoder.patch_embed, 0)]
    for index, stage in enumerate(encoder.stages):
        for number, block in enumerate(stage.blocks, start=1):
            count += 1
            places.append((block, count))
            every = stage.extra_norm_every
            if every and number % every == 0:
                places.append((stage.extra_norms[number // every - 1], count))
        if index < len(encoder.merges):
            places.append((encoder.merges[index], count))
    for module, layer in places:
        for parameter in module.parameters():
            counted.add(parameter)
            yield parameter, layer
    counted.add(model.mask_token)
    yield model.mask_token, 0
    for parameter in model.parameters():
        if parameter not in counted:
            yield parameter, count + 1


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_groups_of_every_variant(variant: str) -> None:
    with torch.device("meta"):
        model = SimMIM(build_encoder(variant, image_size=192, window_size=12), mask_cell=32)
    depths = VARIANTS[variant].depths
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {names[parameter]: layer for parameter, layer in layers_by_module(model)}
    layers = Layers.of(model)
    assert {name: layers.layer_of(name) for name in names.values()} == expected
    assert set(expected.values()) == set(range(sum(depths) + 2))

    optimizer = OptimizerSettings(lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    groups = parameter_groups(model, optimizer)
    listed = [name for group in groups for name in group.names]
    assert sorted(listed) == sorted(names.values())  # each parameter, once
    assert len({(group.lr_factor, group.weight_decay) for group in groups}) == len(groups)
    for group in groups:
        for name in group.names:
            assert group.lr_factor == 0.75 ** (sum(depths) + 1 - expected[name])

    parameters = dict(model.named_parameters())
    undecayed = {name for group in groups if not group.weight_decay for name in group.names}
    excluded = {
        "1-D": {name for name in parameters if parameters[name].ndim == 1},
        "bias": {name for name in parameters if name.endswith("bias")},
        "position": {name for name in parameters if ".position_bias." in name},
        "scale": {name for name in parameters if name.endswith(".logit_scale")},
        "token": {"mask_token"} & set(parameters),
    }
    assert all(excluded.values())
    assert undecayed == set().union(*excluded.values())
    blocks = sum(depths)
    assert len(excluded["scale"]) == blocks
    assert len(excluded["position"]) == 3 * blocks
    decayed = set(parameters) - undecayed
    assert {name.rsplit(".", 2)[-2] for name in decayed} == {
        "projection",  # of the patch embedding, the attention and the decoder
        "qkv",
        "expand",
        "reduce",
        "reduction",
    }


def test_published_factors_of_fine_tuning() -> None:
    with torch.device("meta"):
        encoder = build_encoder("base", image_size=224, window_size=14)
        model = Classifier(encoder, encoder.num_features)
    groups = parameter_groups(model, OptimizerSettings(lr=5e-3, layer_decay=0.75))
    factors = {name: group.lr_factor for group in groups for name in group.names}
    assert factors["head.weight"] == factors["encoder.norm.bias"] == 1
    assert factors["encoder.stages.3.blocks.1.mlp.expand.weight"] == 0.75
    assert factors["encoder.patch_embed.projection.weight"] == 0.75**25
    assert factors["encoder.stages.0.blocks.0.norm1.weight"] == 0.75**24
    last_of_stage_2 = factors["encoder.stages.2.blocks.17.attention.qkv.weight"]
    assert factors["encoder.merges.2.reduction.weight"] == last_of_stage_2 == 0.75**3


@pytest.mark.parametrize("renamed", ["position_bias", "logit_scale"])
def test_an_exclusion_that_matches_nothing_is_refused(renamed: str) -> None:
    model = tiny_model()
    for module in list(model.modules()):
        if hasattr(module, renamed):
            setattr(module, renamed, None)
    with pytest.raises(ValueError, match=f"no parameter is named {renamed}"):
        parameter_groups(model, OptimizerSettings(lr=1.0))


def test_a_model_without_an_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no encoder .* layer_of"):
        parameter_groups(nn.Linear(2, 2), OptimizerSettings(lr=1.0))


def test_exclusions_match_whole_components_of_names_in_the_encoder() -> None:
    layers, matrix = Layers.of(tiny_model()), nn.Parameter(torch.ones(2, 2))
    assert layers.decays("encoder.position_bias_projection.weight", matrix)
    assert not layers.decays("encoder.position_bias.expand.weight", matrix)
    assert layers.decays("decoder.position_bias.expand.weight", matrix)


def test_frozen_parameters_are_in_no_group() -> None:
    encoder = tiny_model().encoder
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    model = Classifier(encoder, encoder.num_features)
    groups = parameter_groups(model, OptimizerSettings(lr=1e-3))
    assert {name for group in groups for name in group.names} == {"head.weight", "head.bias"}


def test_without_gradient_only_decaying_parameters_shrink_by_their_layers_rate() -> None:
    model = tiny_model()
    settings = OptimizerSettings(lr=0.1, weight_decay=0.5, layer_decay=0.5)
    groups = parameter_groups(model, settings)
    optimizer = build_optimizer(model, settings, groups)
    set_learning_rate(optimizer, lambda factor: 0.04 * factor)
    for parameter in model.parameters():
        parameter.data.uniform_(1, 2)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step()
    layers = Layers.of(model)
    for name, after in model.named_parameters():
        rate = 0.04 * 0.5 ** (4 - layers.layer_of(name))
        shrunk = 1 - rate * 0.5 if layers.decays(name, after) else 1
        torch.testing.assert_close(after.detach(), before[name] * shrunk, rtol=1e-6, atol=0)


def test_the_first_step_moves_every_weight_by_its_layers_rate() -> None:
    model = tiny_model()
    settings = OptimizerSettings(lr=1.0, weight_decay=0, layer_decay=0.5, betas=(0.9, 0.95))
    optimizer = build_optimizer(model, settings, parameter_groups(model, settings))
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    set_learning_rate(optimizer, lambda factor: 0.01 * factor)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step()
    layers = Layers.of(model)
    for name, after in model.named_parameters():
        moved = (after.detach() - before[name]).mean().item()
        assert moved == pytest.approx(0.01 * 0.5 ** (4 - layers.layer_of(name)), rel=1e-3)


def test_adamw_is_fused_on_cpus_and_skips_a_nonfinite_step() -> None:
    model = tiny_model()
    settings = OptimizerSettings(lr=1e-3)
    optimizer = build_optimizer(model, settings, parameter_groups(model, settings))
    assert all(group["fused"] for group in optimizer.param_groups)
    for norm in (1.0, math.nan, math.inf):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0 if norm == 1.0 else norm)
        step_if_finite(optimizer, torch.tensor(norm))
    once = tiny_model()
    reference = build_optimizer(once, settings, parameter_groups(once, settings))
    for parameter in once.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    reference.step()
    for one, other in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.equal(one, other)
        states = optimizer.state[one], reference.state[other]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_layer_decay_of_1_leaves_two_groups() -> None:
    model = tiny_model()
    groups = parameter_groups(model, OptimizerSettings(lr=1e-3))
    assert [(group.weight_decay, group.lr_factor) for group in groups] == [(0.0, 1.0), (0.05, 1.0)]


def test_the_table_counts_every_parameter() -> None:
    model = tiny_model()
    groups = parameter_groups(model, OptimizerSettings(lr=1e-3, layer_decay=0.5))
    rows = [line.replace(",", "").split() for line in layer_table(model, groups).split("\n")]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3", "4"]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(
        [0.5**4, 0.5**3, 0.5**2, 0.5, 1], abs=1e-4
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(int(row[2]) for row in rows[1:]) == total
    for column, kind in ((3, "position_bias"), (4, "logit_scale")):
        named = {
            name: parameter.numel()
            for name, parameter in model.named_parameters()
            if kind in name.split(".")
        }
        by_layer = [int(row[column]) for row in rows[1:]]
        assert by_layer[0] == by_layer[4] == 0  # of blocks alone
        assert min(by_layer[1:4]) > 0
        assert sum(by_layer) == sum(named.values())
    assert " ".join(rows[1][5:]) == "mask_token patch_embed"
    assert " ".join(rows[5][5:]) == "decoder norm"


def test_adamw_8bit_without_bitsandbytes_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    model, settings = tiny_model(), OptimizerSettings(lr=1e-3, name="adamw_8bit")
    with pytest.raises(ValueError, match=r"pip install 'simmim\[8bit\]'"):
        build_optimizer(model, settings, parameter_groups(model, settings))
