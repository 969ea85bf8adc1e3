"""Dense heads of transformers train on the encoder with its pretrained weights."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinv2 import SwinV2, SwinV2Config
from swinv2.blocks import Block
from swinv2.bridges.transformers_backbone import backbone_config, fill_backbone, register_backbone

pytestmark = pytest.mark.peer
Build = Callable[..., SwinV2]
STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(autouse=True)
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    register_backbone()
    yield module
    module.utils.logging.enable_progress_bar()


def build_backbone(encoder: SwinV2, out_features: list[str] | None = None) -> Any:
    from swinv2.bridges.transformers_backbone import SwinV2Backbone

    backbone = SwinV2Backbone(backbone_config(encoder.config, out_features=out_features))
    fill_backbone(backbone, encoder)
    return backbone


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_trains(encoder: nn.Module, loss: Tensor) -> None:
    """Every weight of the encoder gets a gradient, and none of them is zero all over."""
    assert torch.isfinite(loss)
    loss.backward()
    dead = [
        name
        for name, weight in encoder.named_parameters()
        if weight.grad is None or not weight.grad.abs().max() > 0
    ]
    # One token alone in its window has nothing to compare itself with.
    assert [name for name in dead if "attention" not in name] == []
    assert len(dead) < len(list(encoder.parameters())) / 4


@pytest.mark.parametrize("size", [(64, 64), (70, 90)])
def test_maps_are_the_normalised_features_of_the_encoder(
    build: Build, size: tuple[int, int]
) -> None:
    encoder = build(extra_norm_every=2, window_size=(8, 4))
    backbone = build_backbone(encoder).eval()
    images = draw(2, 3, *size)
    with torch.no_grad():
        *before, last = encoder.features(images)
        output = backbone(images, output_hidden_states=True)
    for ours, theirs in zip(before, output.feature_maps, strict=False):
        normalised = nn.functional.layer_norm(ours.permute(0, 2, 3, 1), ours.shape[1:2])
        torch.testing.assert_close(theirs, normalised.permute(0, 3, 1, 2))
    assert torch.equal(output.feature_maps[-1], last)
    assert [one.shape[1] for one in output.feature_maps] == backbone.channels
    assert [one.shape[1] for one in output.hidden_states] == [8, *backbone.channels]
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(before, output.hidden_states[1:-1], strict=True)
    )
    assert backbone(images, return_dict=False)[0][0].shape == output.feature_maps[0].shape


def test_maps_are_selected_by_name_or_index(build: Build) -> None:
    encoder = build()
    images = draw(1, 3, 64, 64)
    backbone = build_backbone(encoder, out_features=["stem", "stage3"]).eval()
    assert (backbone.out_indices, backbone.channels) == ([0, 3], [8, 32])
    with torch.no_grad():
        stem, third = backbone(images).feature_maps
        torch.testing.assert_close(
            stem.permute(0, 2, 3, 1), nn.functional.layer_norm(encoder.embed(images), (8,))
        )
    assert third.shape == (1, 32, 4, 4)
    config = copy.deepcopy(backbone.config)
    config.out_indices = (2, 4)
    assert config.out_features == ["stage2", "stage4"]
    with pytest.raises(ValueError, match="stage_names"):
        build_backbone(encoder, out_features=["stage5"])
    with pytest.raises(ValueError, match="attentions"):
        backbone(images, output_attentions=True)


def test_hidden_states_follow_the_config_and_share_the_graph(build: Build) -> None:
    backbone = build_backbone(build())
    images = draw(2, 3, 64, 64)
    assert backbone(images).hidden_states is None
    backbone.config.output_hidden_states = True
    output = backbone(images)
    assert [one.shape[1] for one in output.hidden_states] == [8, *backbone.channels]
    assert backbone(images, output_hidden_states=False).hidden_states is None
    output.hidden_states[0].retain_grad()
    output.feature_maps[-1].sum().backward()
    assert output.hidden_states[0].grad.abs().max() > 0


def test_maps_can_be_changed_after_building(build: Build, tmp_path: Path) -> None:
    from swinv2.bridges.transformers_backbone import SwinV2Backbone

    encoder = build()
    backbone = build_backbone(encoder, out_features=STAGES[2:]).double().eval()
    images = draw(1, 3, 64, 64).double()
    *_, third, fourth = backbone(images).feature_maps
    backbone.out_features = STAGES[1:3]
    second, still_third = backbone(images).feature_maps
    assert torch.equal(still_third, third)
    expected = encoder.double().features(images)[1].permute(0, 2, 3, 1)
    torch.testing.assert_close(
        second.permute(0, 2, 3, 1), nn.functional.layer_norm(expected, expected.shape[3:])
    )
    backbone.save_pretrained(tmp_path / "saved")
    loaded, report = SwinV2Backbone.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.out_features == STAGES[1:3]
    backbone.out_indices = [4]
    assert backbone.out_features == STAGES[3:]
    (again,) = backbone(images).feature_maps
    assert torch.equal(again, fourth)
    backbone.config.out_features = ["stem"]
    with pytest.raises(ValueError, match="set out_features of the backbone"):
        backbone(images)


def test_base_model_and_input_embeddings(build: Build, tmp_path: Path) -> None:
    from swinv2.bridges.transformers_backbone import SwinV2Backbone

    backbone = build_backbone(build())
    assert backbone.base_model is backbone
    embedding = backbone.get_input_embeddings()
    assert embedding is backbone.encoder.patch_embed
    frozen = backbone.requires_grad_(False)
    frozen.enable_input_require_grads()  # as adapters do
    assert frozen(draw(1, 3, 64, 64)).feature_maps[0].requires_grad
    frozen.disable_input_require_grads()
    assert not frozen(draw(1, 3, 64, 64)).feature_maps[0].requires_grad
    other = SwinV2Backbone(backbone.config).get_input_embeddings()
    backbone.set_input_embeddings(other)
    assert backbone.encoder.patch_embed is other


def gradients_and_calls(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[list[Tensor], int]:
    """Gradients of a loss, and how often the first block is computed for them."""
    block = next(one for one in model.modules() if isinstance(one, Block))
    calls: list[None] = []
    hook = block.attention.register_forward_hook(lambda *_: calls.append(None))
    model.zero_grad()
    torch.manual_seed(2)
    loss().backward()
    hook.remove()
    return [one.grad.clone() for one in model.parameters() if one.grad is not None], len(calls)


def test_blocks_are_recomputed_in_the_backward_of_the_backbone(build: Build) -> None:
    backbone = build_backbone(build(drop_path=0.3)).train()
    images = draw(4, 3, 64, 64)

    def loss() -> Tensor:
        maps = backbone(images).feature_maps
        return torch.stack([one.square().mean() for one in maps]).sum()

    plain, once = gradients_and_calls(backbone, loss)
    backbone.gradient_checkpointing_enable()
    assert backbone.is_gradient_checkpointing
    again, twice = gradients_and_calls(backbone, loss)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    backbone.gradient_checkpointing_disable()
    assert gradients_and_calls(backbone, loss)[1] == 1
    backbone.gradient_checkpointing_enable()
    backbone.eval()
    assert gradients_and_calls(backbone, loss)[1] == 1
    assert pickle.loads(pickle.dumps(backbone)).is_gradient_checkpointing


@pytest.mark.parametrize("head", ["UperNet", "Detr"])
def test_blocks_are_recomputed_inside_dense_heads(
    build: Build, transformers: Any, head: str
) -> None:
    config = build_backbone(build(), out_features=STAGES[2:]).config
    if head == "UperNet":
        sizes = {"hidden_size": 8, "num_labels": 3, "use_auxiliary_head": False}
        model = transformers.UperNetForSemanticSegmentation(
            transformers.UperNetConfig(backbone_config=config, **sizes)
        )
        checkpointed = model.backbone  # the head has no checkpointing of its own
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 2, "dropout": 0.0}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32}
        model = checkpointed = transformers.DetrForObjectDetection(
            transformers.DetrConfig(backbone_config=config, num_labels=3, **layers, **heads)
        )
    images = draw(2, 3, 64, 64)

    def loss() -> Tensor:
        return model(pixel_values=images).logits.square().mean()

    model.train()
    plain, once = gradients_and_calls(model, loss)
    checkpointed.gradient_checkpointing_enable()
    again, twice = gradients_and_calls(model, loss)
    assert (once, twice) == (1, 2)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_saved_and_loaded_by_transformers(
    build: Build, tmp_path: Path, transformers: Any, assert_same_weights: Callable[..., None]
) -> None:
    from swinv2.bridges.transformers_backbone import SwinV2Backbone

    backbone = build_backbone(build(drop_path=0.2), out_features=STAGES[1:])
    backbone.save_pretrained(tmp_path / "saved")
    again, report = SwinV2Backbone.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_weights(backbone, again)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.encoder_config() == backbone.config.encoder_config()
    assert config.encoder_config().pretrained_window_sizes == ((8, 8), (8, 8), (4, 4), (2, 2))
    assert (config.out_features, config.num_channels) == (STAGES[1:], 3)
    for other in (again, pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        images = draw(1, 3, 64, 64)
        for one, two in zip(
            backbone.eval()(images).feature_maps, other.eval()(images).feature_maps, strict=True
        ):
            assert torch.equal(one, two)


def test_fresh_weights_are_initialised_as_the_encoders(transformers: Any, build: Build) -> None:
    config = build_backbone(build(), out_features=STAGES).config
    backbone = transformers.AutoBackbone.from_config(config)
    encoder = backbone.encoder
    assert all(
        not norm.weight.any() and not norm.bias.any()
        for stage in encoder.stages
        for block in stage.blocks
        for norm in (block.norm1, block.norm2)
    )
    assert torch.equal(encoder.merges[0].norm.weight, torch.ones(16))
    scale = encoder.stages[0].blocks[0].attention.logit_scale
    torch.testing.assert_close(scale, torch.full((1,), 10.0).log())
    assert 0.015 < float(encoder.merges[0].reduction.weight.detach().std()) < 0.025


def test_a_norm_missing_in_a_folder_is_initialised(build: Build, tmp_path: Path) -> None:
    from swinv2.bridges.transformers_backbone import SwinV2Backbone

    saved = build_backbone(build(), out_features=STAGES[3:])
    saved.save_pretrained(tmp_path / "saved")
    loaded = SwinV2Backbone.from_pretrained(tmp_path / "saved", out_features=STAGES[2:])
    norms = loaded.hidden_states_norms
    assert torch.equal(norms["stage3"].weight, torch.ones(32))
    assert torch.equal(norms["stage4"].weight, saved.hidden_states_norms["stage4"].weight)


def test_upernet_trains_on_it(build: Build, transformers: Any) -> None:
    backbone = build_backbone(build())
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone.config,
            hidden_size=8,
            num_labels=3,
            auxiliary_in_channels=32,
            auxiliary_channels=8,
        )
    )
    model.backbone.load_state_dict(backbone.state_dict(), strict=True)
    output = model(
        pixel_values=draw(2, 3, 72, 88), labels=torch.arange(3).repeat(2, 72, 30)[..., :88]
    )
    assert output.logits.shape == (2, 3, 72, 88)
    assert_trains(model.backbone, output.loss)


@pytest.mark.parametrize("whole", [False, True], ids=["decoder", "with-its-loss"])
def test_mask2former_trains_on_it(build: Build, transformers: Any, whole: bool) -> None:
    if whole:
        pytest.importorskip("scipy", reason="its loss needs scipy")
    backbone = build_backbone(build())
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone.config,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=4,
        num_labels=3,
        train_num_points=64,
    )
    images, masks = draw(1, 3, 64, 64), torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    if whole:
        model = transformers.Mask2FormerForUniversalSegmentation(config)
        encoder = model.model.pixel_level_module.encoder
        encoder.load_state_dict(backbone.state_dict(), strict=True)
        classes = [torch.tensor([0, 2])]
        loss = model(pixel_values=images, mask_labels=[masks], class_labels=classes).loss
    else:
        model = transformers.Mask2FormerModel(config)
        encoder = model.pixel_level_module.encoder
        encoder.load_state_dict(backbone.state_dict(), strict=True)
        output = model(pixel_values=images)
        assert output.masks_queries_logits[-1].shape == (1, 4, 16, 16)
        loss = output.masks_queries_logits[-1].square().mean()
    assert_trains(encoder, loss)


@pytest.mark.parametrize("whole", [False, True], ids=["decoder", "with-its-loss"])
@pytest.mark.parametrize("family", ["Detr", "DeformableDetr"])
def test_detr_trains_on_it(build: Build, transformers: Any, family: str, whole: bool) -> None:
    if whole:
        pytest.importorskip("scipy", reason="its loss needs scipy")
    backbone = build_backbone(
        build(), out_features=STAGES[1:] if family == "DeformableDetr" else STAGES[3:]
    )
    config = getattr(transformers, f"{family}Config")(
        backbone_config=backbone.config,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        num_labels=3,
    )
    model = getattr(transformers, f"{family}ForObjectDetection")(config)
    (encoder,) = (one for one in model.modules() if type(one) is type(backbone))
    encoder.load_state_dict(backbone.state_dict(), strict=True)
    boxes = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    output = model(pixel_values=draw(1, 3, 96, 64), labels=[boxes] if whole else None)
    assert output.pred_boxes.shape == (1, 4, 4)
    loss = output.logits.square().mean() + output.pred_boxes.square().mean()
    assert_trains(encoder, output.loss if whole else loss)


def test_a_missing_transformers_is_reported_with_its_remedy() -> None:
    program = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
from swinv2.bridges.transformers_backbone import register_backbone
try:
    register_backbone()
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        timeout=120,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
    assert "pip install 'simmim[export]'" in done.stdout


def test_impossible_sizes_are_refused(build: Build) -> None:
    config_class = type(build_backbone(build()).config)
    assert config_class().encoder_config() == SwinV2Config(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)
    )
    with pytest.raises(ValueError, match="num_heads"):
        config_class(embed_dim=8, num_heads=[3, 3, 3, 3])
