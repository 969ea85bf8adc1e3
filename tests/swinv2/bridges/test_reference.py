"""Checkpoints of the published code: strict round trips, and no code in them runs."""

import re
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from swinv2 import SwinV2, load_encoder, save_encoder, variant_config
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.conversion import load_renamed
from swinv2.bridges.layer_names import rename_tensor
from swinv2.bridges.reference import (
    export_reference,
    import_reference,
    reference_config,
    to_reference,
)
from tests.swinv2.bridges.drawn_heads import MEAN, STD, Build, Same, draw_classifier, draw_head

PUBLISHED = {
    "tiny": "swinv2_tiny_window8_256",
    "small": "swinv2_small_window8_256",
    "base": "swinv2_base_window12_192",
    "large": "swinv2_large_window12_192",
}


SPLIT = partial(rename_tensor, merge_shift=0)


def with_buffers(
    encoder: SwinV2, tensors: dict[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """Add the buffers of the published model, computed from their definition."""
    config = encoder.config
    references = config.pretrained_window_sizes or config.stage_windows
    added = {}
    for stage, (resolution, window) in enumerate(
        zip(config.stage_resolutions, config.stage_windows, strict=True)
    ):
        side, reference = window[0], references[stage][0]
        offsets = torch.arange(1 - side, side) * 8 / max(reference - 1, 1)
        spaced = offsets.sign() * (offsets.abs() + 1).log2() / 3
        for block in range(config.depths[stage]):
            name = f"{prefix}layers.{stage}.blocks.{block}."
            table = torch.stack(torch.meshgrid(spaced, spaced, indexing="ij"), dim=-1)[None]
            added[f"{name}attn.relative_coords_table"] = table
            added[f"{name}attn.relative_position_index"] = torch.zeros(side**2, side**2).long()
            if block % 2 and resolution[0] > config.window_size[0]:
                count = (resolution[0] // side) ** 2
                added[f"{name}attn_mask"] = torch.zeros(count, side**2, side**2)
    return tensors | added


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_published_tensors_of_each_variant_map_one_to_one(
    reference_shapes: dict[str, dict[str, tuple[int, ...]]], variant: str
) -> None:
    shapes = reference_shapes[PUBLISHED[variant]]
    head = {name: shape for name, shape in shapes.items() if name.startswith("head.")}
    assert head.keys() == {"head.weight", "head.bias"}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    encoder = load_renamed(tensors, variant_config(variant), SPLIT, source="list", head_shapes=head)
    assert len(encoder.state_dict()) == len(shapes) - 2


@pytest.mark.parametrize(
    ("holds", "sizes"),
    [
        ("encoder", {}),
        ("masked", {}),
        ("classifier", {}),
        ("encoder", {"image_size": 128, "depths": (2, 1, 1, 1), "drop_path": 0.2}),
        ("masked", {"image_size": 32, "patch_size": 2}),
        ("encoder", {"image_size": 32}),
        ("classifier", {"pretrained_window_sizes": ((4, 4), (4, 4), (2, 2), (2, 2))}),
        ("encoder", {"mlp_ratio": 2.7}),
        ("encoder", {"pretrained_window_sizes": ((4, 4), (4, 4), (2, 2), (1, 1))}),
        ("encoder", {"in_channels": 3, "depths": (1, 1, 1), "num_heads": (1, 2, 4)}),
    ],
    ids=[
        *("plain", "masked", "classifier", "windows", "patch-2", "last-stage-1x1", "transferred"),
        *("narrow-mlp", "window-1", "three-stages"),
    ],
)
def test_a_round_trip_is_bit_identical(
    build: Build, assert_same_weights: Same, tmp_path: Path, sizes: dict[str, Any], holds: str
) -> None:
    encoder = build(**sizes)
    head = draw_head(encoder) if holds == "masked" else None
    classifier = draw_classifier(encoder) if holds == "classifier" else None
    path = export_reference(
        encoder, tmp_path / "out", mean=MEAN, std=STD, head=head, classifier=classifier
    )
    back = import_reference(path)
    assert_same_weights(encoder, back.encoder)
    assert (back.mean, back.std, back.dropped) == (MEAN, STD, ())
    assert back.encoder.config == encoder.config
    images = torch.randn(1, 3, *encoder.config.image_size)
    with torch.no_grad():
        assert torch.equal(encoder(images), back.encoder(images))
    assert (back.head is None, back.classifier is None) == (head is None, classifier is None)
    for one, other in ((head, back.head), (classifier, back.classifier)):
        for name in vars(one) if one is not None else ():
            ours, theirs = getattr(one, name), getattr(other, name)
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, name


def test_a_transferred_encoder_keeps_its_first_windows(build: Build, tmp_path: Path) -> None:
    encoder = build(image_size=192, window_size=12)
    encoder.set_input(image_size=256, window_size=16)
    path = export_reference(encoder, tmp_path / "out", mean=MEAN, std=STD)
    assert reference_config(encoder)["pretrained_window_sizes"] == [12, 12, 12, 6]
    assert import_reference(path).encoder.config == encoder.config


@pytest.mark.peer
@pytest.mark.parametrize(
    ("image_size", "window_size", "pretrained"),
    [(192, 12, None), (256, 8, None), (384, 24, ((12, 12), (12, 12), (12, 12), (6, 6)))],
)
def test_timm_converts_the_checkpoint_as_a_published_one(
    build: Build,
    timm: ModuleType,
    tmp_path: Path,
    image_size: int,
    window_size: int,
    pretrained: Any,
) -> None:
    encoder = build(
        image_size=image_size,
        window_size=window_size,
        pretrained_window_sizes=pretrained,
        depths=(2, 1, 1, 1),
    )
    classifier = draw_classifier(encoder)
    path = export_reference(encoder, tmp_path / "out", mean=MEAN, std=STD, classifier=classifier)
    arguments = reference_config(encoder) | {"num_classes": 5}
    peer = timm.create_model("swinv2_tiny_window8_256", **arguments).eval()
    content = torch.load(path / "checkpoint.pth", weights_only=True)
    convert = sys.modules["timm.models.swin_transformer_v2"].checkpoint_filter_fn
    peer.load_state_dict(convert(content, peer), strict=True)
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = encoder(images)
        logits = features.mean((1, 2)) @ classifier.weight.T + classifier.bias
        torch.testing.assert_close(peer.forward_features(images), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(peer(images), logits, rtol=1e-5, atol=1e-5)


@contextmanager
def published_code(encoder: SwinV2, seen: dict[str, Any]) -> Any:
    """Stand for a checkout: a model with the published names and shapes of tensors and buffers."""

    class SwinTransformerV2(nn.Module):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            seen.update(arguments)
            self.tensors = with_buffers(
                encoder, {name: part * 0 for name, part in to_reference(encoder).items()}
            )

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return self.tensors

        def load_state_dict(self, tensors: Any, strict: bool = True, assign: bool = False) -> Any:
            both = tensors.keys() & self.tensors.keys()
            assert all(tensors[name].shape == self.tensors[name].shape for name in both)
            return self.tensors.keys() - both, tensors.keys() - both

    models, module = ModuleType("models"), ModuleType("models.swin_transformer_v2")
    module.SwinTransformerV2 = SwinTransformerV2  # type: ignore[attr-defined]
    sys.modules |= {"models": models, "models.swin_transformer_v2": module}
    try:
        yield
    finally:
        del sys.modules["models"], sys.modules["models.swin_transformer_v2"]


@pytest.mark.parametrize("masked", [False, True])
def test_the_readme_example_loads_it(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    encoder = build(image_size=128)
    head = draw_head(encoder) if masked else None
    path = export_reference(encoder, tmp_path / "out", mean=MEAN, std=STD, head=head)
    lines = re.search(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    monkeypatch.chdir(path)
    seen: dict[str, Any] = {}
    with published_code(encoder, seen):
        exec(compile(lines[1], "README", "exec"), {})
    assert seen == reference_config(encoder)


def test_settings_have_the_published_names(build: Build, tmp_path: Path) -> None:
    path = export_reference(build(), tmp_path / "out", mean=MEAN, std=STD)
    settings = yaml.safe_load((path / "config.yaml").read_text())
    assert settings["DATA"] == {"IMG_SIZE": 64}
    assert settings["MODEL"]["TYPE"] == "swinv2"
    swin = settings["MODEL"]["SWINV2"]
    assert swin["WINDOW_SIZE"] == 8
    assert swin.keys() == {
        *("PATCH_SIZE", "IN_CHANS", "EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE"),
        *("MLP_RATIO", "PRETRAINED_WINDOW_SIZES"),
    }


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize(
    ("image_size", "window_size", "pretrained"),
    [
        (64, 8, None),
        (128, 8, None),
        (256, 16, ((12, 12), (12, 12), (12, 12), (6, 6))),
        (64, 16, ((12, 12), (8, 8), (4, 4), (2, 2))),
    ],
)
def test_sizes_follow_from_buffers_which_are_dropped(
    build: Build,
    assert_same_weights: Same,
    tmp_path: Path,
    image_size: int,
    window_size: int,
    pretrained: Any,
    prefix: str,
) -> None:
    encoder = build(
        image_size=image_size, window_size=window_size, pretrained_window_sizes=pretrained
    )
    head = draw_head(encoder) if prefix else None
    tensors = with_buffers(encoder, to_reference(encoder, head=head), prefix)
    # As SimMIM's release named the position bias.
    tensors = {name.replace("cpb_mlp", "rpe_mlp"): part for name, part in tensors.items()}
    torch.save({"model": tensors, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    back = import_reference(tmp_path / "a.pth")
    assert_same_weights(encoder, back.encoder)
    assert back.encoder.config.stage_windows == encoder.config.stage_windows
    assert back.encoder.config.image_size == encoder.config.image_size
    expected = pretrained or encoder.config.stage_windows
    assert back.encoder.config.pretrained_window_sizes == expected
    assert any("relative_coords_table" in name for name in back.dropped)
    assert (back.head is not None) == bool(prefix)


@contextmanager
def yacs_installed() -> Any:
    """Stand for yacs while a checkpoint is written: its node is a dict with attributes."""

    class CfgNode(dict):  # type: ignore[type-arg]
        def __init__(self, content: dict[str, Any]) -> None:
            nested = {k: CfgNode(v) if isinstance(v, dict) else v for k, v in content.items()}
            super().__init__(nested)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    sys.modules |= {"yacs": package, "yacs.config": module}
    try:
        yield CfgNode
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]


def test_yacs_settings_are_read_without_yacs(
    build: Build, assert_same_weights: Same, tmp_path: Path
) -> None:
    encoder = build(image_size=128, window_size=8)
    settings = {
        "DATA": {"IMG_SIZE": 128},
        "MODEL": {"TYPE": "swinv2", "DROP_PATH_RATE": 0.1, "SWINV2": {"WINDOW_SIZE": 8}},
    }
    settings["MODEL"]["SWINV2"]["PRETRAINED_WINDOW_SIZES"] = [0, 0, 0, 0]
    with yacs_installed() as node:
        torch.save(
            {"model": to_reference(encoder), "config": node(settings)}, tmp_path / "ckpt.pth"
        )
    back = import_reference(tmp_path / "ckpt.pth").encoder
    assert_same_weights(encoder, back)
    assert (back.config.image_size, back.config.window_size) == ((128, 128), (8, 8))
    assert back.config.pretrained_window_sizes is None
    assert back.config.drop_path == 0.1

    settings["MODEL"]["TYPE"] = "swin"
    torch.save({"model": to_reference(encoder), "config": settings}, tmp_path / "ckpt.pth")
    with pytest.raises(BridgeError, match="'swin'"):
        import_reference(tmp_path / "ckpt.pth")


def test_only_an_earlier_export_is_replaced(build: Build, tmp_path: Path) -> None:
    path = export_reference(build(), tmp_path / "out", mean=MEAN, std=STD)
    export_reference(build(window_size=4), path, mean=MEAN, std=STD)
    assert import_reference(path).encoder.config.window_size == (4, 4)
    (path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not replaced"):
        export_reference(build(), path, mean=MEAN, std=STD)


def test_an_imported_encoder_is_saved_and_transferred(build: Build, tmp_path: Path) -> None:
    encoder = build(image_size=64, window_size=8)
    export_reference(encoder, tmp_path / "out", mean=MEAN, std=STD)
    imported = import_reference(tmp_path / "out")
    save_encoder(imported.encoder, tmp_path / "ours", mean=imported.mean, std=imported.std)
    larger = load_encoder(tmp_path / "ours", image_size=96, window_size=12)
    encoder.set_input(96, 12)
    assert larger.config == encoder.config
    images = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        assert torch.equal(larger(images), encoder(images))
