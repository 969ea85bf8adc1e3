"""Checkpoints of the published code: strict round trips, and no code in them runs."""

import re
import sys
from collections.abc import Callable
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
from swinv2.bridges.checkpoints import BridgeError, ClassifierHead, MaskedImageHead
from swinv2.bridges.conversion import load_renamed
from swinv2.bridges.layer_names import rename_tensor
from swinv2.bridges.reference import (
    export_reference,
    import_reference,
    reference_config,
    to_reference,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZES = {"image_size": 64, "window_size": 8, "pretrained_window_sizes": "same"}
PUBLISHED = {
    "tiny": "swinv2_tiny_window8_256",
    "small": "swinv2_small_window8_256",
    "base": "swinv2_base_window12_192",
    "large": "swinv2_large_window12_192",
}
SPLIT = partial(rename_tensor, merge_shift=0)
Build = Callable[..., SwinV2]
Same = Callable[[nn.Module, nn.Module], None]


def draw_head(encoder: SwinV2) -> MaskedImageHead:
    generator = torch.Generator().manual_seed(7)
    channels = encoder.strides[-1] ** 2 * encoder.config.in_channels
    return MaskedImageHead(
        mask_token=torch.randn(1, 1, 1, encoder.config.embed_dim, generator=generator),
        weight=torch.randn(channels, encoder.num_features, 1, 1, generator=generator),
        bias=torch.randn(channels, generator=generator),
    )


def draw_classifier(encoder: SwinV2) -> ClassifierHead:
    generator = torch.Generator().manual_seed(8)
    return ClassifierHead(
        weight=torch.randn(5, encoder.num_features, generator=generator),
        bias=torch.randn(5, generator=generator),
    )


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
            assert torch.equal(getattr(one, name), getattr(other, name)), name


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


def test_unknown_sizes_are_asked_for(
    build: Build, assert_same_weights: Same, tmp_path: Path
) -> None:
    encoder, file = build(), tmp_path / "bare.pth"
    tensors = {f"module.{name}": part for name, part in to_reference(encoder).items()}
    torch.save(tensors, file)
    with pytest.raises(BridgeError, match=r"image_size, window_size, pretrained_window_sizes"):
        import_reference(file)
    with pytest.raises(BridgeError, match=r"pretrained_window_sizes: give"):
        import_reference(file, image_size=64, window_size=8)
    back = import_reference(file, **SIZES)
    assert_same_weights(encoder, back.encoder)
    assert back.encoder.config == encoder.config
    assert back.mean == (0.485, 0.456, 0.406)


def test_a_size_that_contradicts_the_file_is_refused(build: Build, tmp_path: Path) -> None:
    path = export_reference(build(), tmp_path / "out", mean=MEAN, std=STD)
    with pytest.raises(BridgeError, match=r"image_size is \(128, 128\).* and \(64, 64\)"):
        import_reference(path, image_size=128)
    with pytest.raises(BridgeError, match="pretrained_window_sizes"):
        import_reference(path, pretrained_window_sizes=[4, 4, 4, 2])
    assert import_reference(path, pretrained_window_sizes=[8, 8, 4, 2])


def test_a_tensor_that_does_not_fit_is_named(
    build: Build, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], str]
) -> None:
    tensors = to_reference(build())
    message = spoil(tensors)
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=message):
        import_reference(tmp_path / "a.pth", **SIZES)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # by torch 2.14
@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (torch.full((64,), torch.nan), "values that are not finite"),
        (torch.full((64,), torch.inf, dtype=torch.float16), "values that are not finite"),
        (torch.ones(64, dtype=torch.int64), r".*torch\.int64"),
        (torch.ones(64, dtype=torch.complex64), r".*torch\.complex64"),
        (torch.ones(64).to_sparse(), "not stored as plain values"),
        (torch.ones(64, device="meta"), "not stored as plain values"),
    ],
    ids=["nan", "inf", "whole", "complex", "sparse", "meta"],
)
def test_tensors_that_are_not_finite_are_named(
    build: Build, tmp_path: Path, spoilt: Tensor, reason: str
) -> None:
    tensors = to_reference(build()) | {"norm.weight": spoilt}
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=rf"finite.*:\n  norm\.weight: {reason}"):
        import_reference(tmp_path / "a.pth", **SIZES)


def test_an_empty_tensor_is_refused(build: Build, tmp_path: Path) -> None:
    tensors = to_reference(build()) | {"patch_embed.proj.weight": torch.zeros(0, 3, 4, 4)}
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=r"shape of patch_embed\.proj\.weight: \(0, 3, 4, 4\)"):
        import_reference(tmp_path / "a.pth", **SIZES)


@pytest.mark.parametrize("lost", ["encoder.mask_token", "decoder.0.bias", "encoder.norm.bias"])
def test_a_simmim_checkpoint_must_be_complete(build: Build, tmp_path: Path, lost: str) -> None:
    encoder = build()
    tensors = to_reference(encoder, head=draw_head(encoder))
    del tensors[lost]
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=f"missing: {lost}"):
        import_reference(tmp_path / "a.pth", **SIZES)


def test_a_pickle_that_runs_code_is_refused(malicious: tuple[Path, Path]) -> None:
    file, folder = malicious
    with pytest.raises(BridgeError, match=r"mkdir.*would run code"):
        import_reference(file, **SIZES)
    assert not folder.exists()


def test_other_architectures_are_refused_by_name(other_model: tuple[Path, str]) -> None:
    file, reason = other_model
    with pytest.raises(BridgeError, match=reason):
        import_reference(file, **SIZES)


def test_files_that_are_not_checkpoints_are_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="does not exist"):
        import_reference(tmp_path / "none.pth")
    cut = tmp_path / "cut.pth"
    torch.save({"model": to_reference(build())}, cut)
    whole = cut.read_bytes()
    for length in (*range(0, len(whole), len(whole) // 40), len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(BridgeError, match=r"truncated|cut short"):
            import_reference(cut)
    cut = cut.rename(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"truncated.*: copy it again"):
        import_reference(cut)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BridgeError, match="holds a list"):
        import_reference(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(BridgeError, match="no tensors by name"):
        import_reference(tmp_path / "empty.pth")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"window_size": (8, 4)}, "not square"),
        ({"image_size": (64, 96), "window_size": 16}, "from the shorter one"),
        ({"image_size": 66}, "multiple of the patch size"),
        ({"image_size": 80}, "odd maps"),
        ({"image_size": 96, "window_size": 7}, "padding that fills"),
        ({"extra_norm_every": 2}, "norm after every 2 blocks"),
    ],
)
def test_an_encoder_unsupported_by_the_published_code_is_refused(
    build: Build, tmp_path: Path, sizes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BridgeError, match=reason):
        export_reference(build(**sizes), tmp_path / "out", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_fit_are_refused(build: Build, tmp_path: Path) -> None:
    encoder, grey = build(), build(in_channels=1)
    with pytest.raises(BridgeError, match=r"decoder\.0\.weight is"):
        to_reference(encoder, head=draw_head(build(patch_size=2)))
    with pytest.raises(BridgeError, match="3 channels, not 1"):
        to_reference(grey, head=draw_head(grey))
    with pytest.raises(BridgeError, match=r"head\.weight is"):
        to_reference(encoder, classifier=draw_classifier(build(embed_dim=16)))
    with pytest.raises(BridgeError, match="leave one of them out"):
        to_reference(encoder, head=draw_head(encoder), classifier=draw_classifier(encoder))


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
