"""torchvision's and mmpretrain's files, written here in their layouts: every tensor is equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2 import SwinV2
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.importing.detection import detect_library
from swinv2.bridges.importing.mmpretrain import import_mmpretrain
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.importing.torchvision import import_torchvision
from swinv2.bridges.reference import import_reference

Build = Callable[..., SwinV2]
Same = Callable[[nn.Module, nn.Module], None]
Tensors = dict[str, Tensor]


def position_table(window: int, reference: int) -> Tensor:
    offsets = torch.arange(1 - window, window) * 8 / (reference - 1)
    spaced = offsets.sign() * (offsets.abs() + 1).log2() / 3
    return torch.stack(torch.meshgrid(spaced, spaced, indexing="ij"), dim=-1)[None]


def attention_parts(encoder: SwinV2, stage: int, block: int) -> Tensors:
    """Tensors of an attention that both libraries name alike, with their buffers."""
    config, module = encoder.config, encoder.stages[stage].blocks[block].attention
    window = config.stage_windows[stage][0]
    reference = (config.pretrained_window_sizes or config.stage_windows)[stage][0]
    return {
        "logit_scale": module.logit_scale[:, None, None],
        "cpb_mlp.0.weight": module.position_bias.expand.weight,
        "cpb_mlp.0.bias": module.position_bias.expand.bias,
        "cpb_mlp.2.weight": module.position_bias.reduce.weight,
        "qkv.weight": module.qkv.weight,
        "proj.weight": module.projection.weight,
        "proj.bias": module.projection.bias,
        "relative_coords_table": position_table(window, reference),
        "relative_position_index": torch.zeros(window**2, window**2).long(),
    }


def to_torchvision(encoder: SwinV2) -> Tensors:
    parts: Tensors = {}

    def add(prefix: str, tensors: Tensors) -> None:
        parts.update({f"{prefix}.{name}": one.detach().clone() for name, one in tensors.items()})

    add("features.0.0", encoder.patch_embed.projection.state_dict())
    add("features.0.2", encoder.patch_embed.norm.state_dict())
    for stage, blocks in enumerate(encoder.stages):
        for number, block in enumerate(blocks.blocks):
            prefix = f"features.{2 * stage + 1}.{number}"
            add(f"{prefix}.attn", attention_parts(encoder, stage, number))
            query, value = block.attention.query_bias, block.attention.value_bias
            add(
                f"{prefix}.attn", {"qkv.bias": torch.cat([query, torch.full_like(query, 7), value])}
            )
            for ours, theirs in {
                "norm1": "norm1",
                "norm2": "norm2",
                "mlp.expand": "mlp.0",
                "mlp.reduce": "mlp.3",
            }.items():
                add(f"{prefix}.{theirs}", block.get_submodule(ours).state_dict())
        if stage < len(encoder.merges):
            add(f"features.{2 * stage + 2}", encoder.merges[stage].state_dict())
    add("norm", encoder.norm.state_dict())
    add("head", {"weight": torch.ones(5, encoder.num_features), "bias": torch.ones(5)})
    return parts


def unfolded(weight: Tensor) -> Tensor:
    """A merging's weight for the order of `nn.Unfold`: channels, then rows, then columns."""
    out, channels = weight.shape[0], weight.shape[1] // 4
    neighbours = weight.reshape(out, 4, channels)[:, [0, 2, 1, 3]]  # (0, 0), (0, 1), (1, 0), ...
    return neighbours.transpose(1, 2).reshape(out, 4 * channels)


def to_mmpretrain(encoder: SwinV2, prefix: str = "backbone.") -> Tensors:
    parts: Tensors = {}

    def add(place: str, tensors: Tensors) -> None:
        new = {f"{prefix}{place}.{name}": one.detach().clone() for name, one in tensors.items()}
        parts.update(new)

    every = encoder.config.extra_norm_every
    add("patch_embed.projection", encoder.patch_embed.projection.state_dict())
    add("patch_embed.norm", encoder.patch_embed.norm.state_dict())
    for stage, blocks in enumerate(encoder.stages):
        for number, block in enumerate(blocks.blocks):
            place = f"stages.{stage}.blocks.{number}"
            add(f"{place}.attn.w_msa", attention_parts(encoder, stage, number))
            biases = {"q_bias": block.attention.query_bias, "v_bias": block.attention.value_bias}
            add(f"{place}.attn.w_msa", biases)
            for ours, theirs in {
                "norm1": "norm1",
                "norm2": "norm2",
                "mlp.expand": "ffn.layers.0.0",
                "mlp.reduce": "ffn.layers.1",
            }.items():
                add(f"{place}.{theirs}", block.get_submodule(ours).state_dict())
            if every and (number + 1) % every == 0:
                norm = blocks.extra_norms[(number + 1) // every - 1]
                add(f"{place}.norm3", norm.state_dict())
        if stage < len(encoder.merges):
            merge = encoder.merges[stage]
            weight = {"weight": unfolded(merge.reduction.weight)}
            add(f"stages.{stage + 1}.downsample.reduction", weight)
            add(f"stages.{stage + 1}.downsample.norm", merge.norm.state_dict())
    add(f"norm{len(encoder.stages) - 1}", encoder.norm.state_dict())
    return parts


SIZES: list[dict[str, Any]] = [
    {"image_size": 256, "window_size": 8},
    {"image_size": 128, "window_size": 4, "pretrained_window_sizes": ((2, 2),) * 4},
]


@pytest.mark.parametrize("sizes", SIZES, ids=["plain", "transferred"])
def test_torchvision(
    build: Build, assert_same_weights: Same, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    encoder, file = build(**sizes), tmp_path / "swin_v2_t.pth"
    torch.save(to_torchvision(encoder), file)
    assert detect_library(file) == "torchvision"
    found = import_torchvision(file)
    assert_same_weights(encoder, found.encoder)
    assert found.encoder.config.image_size == encoder.config.image_size
    assert found.encoder.config.window_size == encoder.config.window_size
    assert found.classifier is not None
    assert any(note.startswith("image size:") for note in found.notes)
    images = torch.randn(1, 3, *encoder.config.image_size)
    with torch.no_grad():
        assert torch.equal(encoder(images), found.encoder(images))


@pytest.mark.parametrize(
    "sizes",
    [*SIZES, {"image_size": 64, "window_size": 4, "extra_norm_every": 2}],
    ids=["plain", "transferred", "small last window, extra norms"],
)
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_mmpretrain(
    build: Build, assert_same_weights: Same, tmp_path: Path, sizes: dict[str, Any], prefix: str
) -> None:
    encoder, file = build(**sizes), tmp_path / "swinv2.pth"
    tensors = to_mmpretrain(encoder, prefix)
    head = {"head.fc.weight": torch.ones(5, encoder.num_features), "head.fc.bias": torch.ones(5)}
    torch.save({"state_dict": tensors | head, "meta": {"epoch": 3}}, file)
    assert detect_library(file) == "mmpretrain"
    found = import_mmpretrain(file)
    assert_same_weights(encoder, found.encoder)
    assert found.encoder.config.stage_windows == encoder.config.stage_windows
    assert found.encoder.config.image_size == encoder.config.image_size
    assert found.classifier is not None
    assert not any("beside" in note for note in found.notes)


def test_mmpretrain_merges_neighbours_in_the_order_of_unfold(build: Build, tmp_path: Path) -> None:
    encoder = build()
    weight = to_mmpretrain(encoder)["backbone.stages.1.downsample.reduction.weight"]
    tokens = torch.randn(1, 6, 4, 8)
    theirs = F.unfold(tokens.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2) @ weight.T
    ours = encoder.merges[0](tokens).flatten(1, 2)
    torch.testing.assert_close(encoder.merges[0].norm(theirs), ours)


def test_norms_of_other_stages_are_left_out_and_named(build: Build, tmp_path: Path) -> None:
    tensors = to_mmpretrain(build(image_size=256))
    tensors["backbone.norm1.weight"] = torch.ones(16)
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    notes = import_mmpretrain(tmp_path / "a.pth").notes
    assert "not imported: norms of other stages' outputs (norm1.weight)" in notes


@pytest.mark.parametrize("library", ["torchvision", "mmpretrain"])
def test_padded_windows_and_missing_tensors_are_refused(
    build: Build, tmp_path: Path, library: str
) -> None:
    encoder, file = build(image_size=256), tmp_path / "a.pth"
    write, read = {
        "torchvision": (to_torchvision, import_torchvision),
        "mmpretrain": (to_mmpretrain, import_mmpretrain),
    }[library]
    tensors = write(encoder)
    torch.save(tensors, file)
    with pytest.raises(BridgeError, match=f"windows of 8x8 do not divide .*{library} attends"):
        read(file, ImportOptions(image_size=224))
    with pytest.raises(BridgeError, match=f"{library}.*--format {library}"):
        import_reference(file)
    lost = next(name for name in tensors if name.endswith("2.norm2.bias") or "1.norm2.bias" in name)
    del tensors[lost]
    torch.save(tensors, file)
    with pytest.raises(BridgeError, match=rf"{library}; tensors named.*\n  missing: layers\."):
        read(file)


def test_another_library_is_refused(build: Build, tmp_path: Path) -> None:
    torch.save(to_torchvision(build(image_size=256)), tmp_path / "tv.pth")
    torch.save(to_mmpretrain(build(image_size=256)), tmp_path / "mm.pth")
    with pytest.raises(BridgeError, match="not a SwinTransformerV2 of mmpretrain"):
        import_mmpretrain(tmp_path / "tv.pth")
    with pytest.raises(BridgeError, match="not a swin_v2 of torchvision"):
        import_torchvision(tmp_path / "mm.pth")
