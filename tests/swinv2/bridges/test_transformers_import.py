"""Import of every class of transformers: round trips, sizes and defaults."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinv2 import SwinV2, build_encoder
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.transformers import export_transformers, import_transformers
from swinv2.bridges.transformers_layout import parse_config

peer = pytest.mark.peer
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TWELVE = ((12, 12), (12, 12), (12, 12), (6, 6))
SIZES = [
    (192, 12, None),
    (256, 8, None),
    (256, 16, None),
    (256, 16, TWELVE),
    (384, 12, None),
    (384, 24, None),
    (384, 24, TWELVE),
]
sizes = pytest.mark.parametrize(("image_size", "window_size", "pretrained"), SIZES)
Build = Callable[..., SwinV2]
Same = Callable[[nn.Module, nn.Module], None]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def export(encoder: SwinV2, path: Path, **more: Any) -> Path:
    channels = encoder.config.in_channels
    mean, std = (MEAN * 2)[:channels], (STD * 2)[:channels]
    return export_transformers(encoder, path, mean=mean, std=std, **more)


def change(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    content |= fields
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"image_size": 32, "patch_size": 2, "drop_path": 0.2},
        {"image_size": 32},
        {"image_size": 32, "pretrained_window_sizes": ((8, 8), (4, 4), (2, 2), (1, 1))},
        {"in_channels": 1, "mlp_ratio": 2.7},
        {"in_channels": 5},
        {"pretrained_window_sizes": ((4, 4), (4, 4), (2, 2), (1, 1))},
        {"depths": (1, 2), "num_heads": (1, 2)},
    ],
    ids=[
        *("plain", "patch-2", "last-stage-1x1", "window-1", "grey", "five-channels", "transferred"),
        "two-stages",
    ],
)
def test_a_round_trip_is_bit_identical(
    build: Build,
    draw_heads: Callable[[SwinV2], dict[str, Any]],
    assert_same_weights: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
) -> None:
    monkeypatch.setattr("swinv2.bridges.transformers.find_spec", lambda name: None)
    encoder = build(**changed)
    given = draw_heads(encoder)
    path = export(encoder, tmp_path / "out", **given)
    channels = encoder.config.in_channels
    for folder in (".", "masked-image-modeling", "image-classification", "backbone"):
        back = import_transformers(path / folder)
        assert back.encoder.config == encoder.config
        assert (back.mean, back.std) == ((MEAN * 2)[:channels], (STD * 2)[:channels])
        assert (back.dropped, back.classes) == ((), ())
        assert back.fresh == (("norm.weight", "norm.bias") if folder == "backbone" else ())
        expected = encoder.state_dict() | {
            name: back.encoder.state_dict()[name] for name in back.fresh
        }
        held = back.encoder.state_dict()
        assert all(torch.equal(held[name], part) for name, part in expected.items())
        found = {
            "masked-image-modeling": ("head", back.head),
            "image-classification": ("classifier", back.classifier),
        }
        for place, (name, head) in found.items():
            assert (head is not None) == (folder == place)
            for part, ours in vars(given[name]).items() if head is not None else ():
                theirs = getattr(head, part)
                same = torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
                assert same, part
    assert_same_weights(import_transformers(path).encoder, encoder)


@peer
@sizes
def test_features_are_equal_at_published_sizes(
    build: Build,
    assert_same_weights: Same,
    tmp_path: Path,
    image_size: int,
    window_size: int,
    pretrained: Any,
) -> None:
    encoder = build(
        image_size=image_size,
        window_size=window_size,
        pretrained_window_sizes=pretrained,
        depths=(2, 1, 2, 1),
    )
    assert_equal_features(encoder, tmp_path / "out")
    back = import_transformers(tmp_path / "out")
    assert_same_weights(back.encoder, encoder)
    assert back.encoder.config == encoder.config


@pytest.mark.slow
@peer
@sizes
def test_the_published_tiny_has_equal_features(
    randomise: Callable[[nn.Module], None],
    tmp_path: Path,
    image_size: int,
    window_size: int,
    pretrained: Any,
) -> None:
    encoder = build_encoder(
        "tiny",
        image_size=image_size,
        window_size=window_size,
        pretrained_window_sizes=pretrained,
    ).eval()
    randomise(encoder)
    assert_equal_features(encoder, tmp_path / "out")
    assert import_transformers(tmp_path / "out").encoder.config == encoder.config


def assert_equal_features(encoder: SwinV2, path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(encoder, path)
    images = draw(1, 3, *encoder.config.image_size)
    model = transformers.Swinv2Model.from_pretrained(path)
    backbone = transformers.Swinv2Backbone.from_pretrained(path / "backbone")
    with torch.no_grad():
        *before, last = encoder.features(images)
        theirs = [
            *backbone(images).feature_maps[:-1],
            model(images).last_hidden_state.transpose(1, 2).reshape(last.shape),
        ]
    for stage, (ours, their_map) in enumerate(zip([*before, last], theirs, strict=True)):
        error = float((ours - their_map).norm() / ours.norm())
        assert error <= 1e-5, f"stage {stage + 1}: {error:.1e}"


def peer_model(transformers: Any, name: str, **fields: object) -> nn.Module:
    sizes = {
        "embed_dim": 8,
        "depths": (1, 2, 1),
        "num_heads": (1, 1, 2),
        "image_size": 64,
        "window_size": 4,
        "encoder_stride": 16,
        "drop_path_rate": 0.2,
        "id2label": {0: "cat", 1: "dog", 2: "fox"},
        **fields,
    }
    model: nn.Module = getattr(transformers, name)(transformers.Swinv2Config(**sizes))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


CLASSES = [
    "Swinv2Model",
    "Swinv2Backbone",
    "Swinv2ForMaskedImageModeling",
    "Swinv2ForImageClassification",
]


@peer
@pytest.mark.parametrize("stored", ["safetensors", "shards", "pickle"])
@pytest.mark.parametrize("name", CLASSES)
def test_folders_of_save_pretrained_are_imported(tmp_path: Path, name: str, stored: str) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    model: Any = peer_model(transformers, name)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if stored == "shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (stored == "shards")
    transformers.ViTImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    if stored == "pickle":
        (tmp_path / "model.safetensors").unlink()
        buffers = {n: part for n, part in model.named_buffers() if n.endswith(("table", "index"))}
        torch.save(model.state_dict() | buffers, tmp_path / "pytorch_model.bin")
    imported = import_transformers(tmp_path)
    config = imported.encoder.config
    assert (config.image_size, config.window_size, config.drop_path) == ((64, 64), (4, 4), 0.2)
    assert config.pretrained_window_sizes is None
    assert (imported.mean, imported.std) == (MEAN, STD)
    assert bool(imported.dropped) == (stored == "pickle")
    assert imported.classes == (("cat", "dog", "fox") if "Classification" in name else ())
    assert bool(imported.fresh) == (name == "Swinv2Backbone")

    images = draw(1, 3, 64, 64)
    with torch.no_grad():
        ours, output = imported.encoder(images), model(images)
        if name == "Swinv2Backbone":
            norm = nn.functional.layer_norm
            last = output.feature_maps[-1].permute(0, 2, 3, 1)
            torch.testing.assert_close(ours, norm(last, last.shape[-1:]), rtol=1e-4, atol=1e-4)
        elif imported.head is not None:
            pixels = nn.functional.conv2d(
                ours.permute(0, 3, 1, 2), imported.head.weight, imported.head.bias
            )
            expected = nn.functional.pixel_shuffle(pixels, 16)
            torch.testing.assert_close(output.reconstruction, expected, rtol=1e-4, atol=1e-4)
        elif imported.classifier is not None:
            logits = imported.classifier.logits(ours)
            torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-4)
        else:
            flat = ours.flatten(1, 2)
            torch.testing.assert_close(output.last_hidden_state, flat, rtol=1e-4, atol=1e-4)


@peer
def test_windows_of_zero_mean_the_present_ones(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model: Any = peer_model(transformers, "Swinv2Model", pretrained_window_sizes=[6, 0, 3])
    model.save_pretrained(tmp_path)
    encoder = import_transformers(tmp_path, ImportOptions(mean=MEAN, std=STD)).encoder
    assert encoder.config.pretrained_window_sizes == ((6, 6), (4, 4), (3, 3))
    images = draw(1, 3, 64, 64)
    with torch.no_grad():
        theirs, ours = model(images).last_hidden_state, encoder(images).flatten(1, 2)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_an_edited_config_overrides_the_stored_one(exported: Path) -> None:
    change(exported, drop_path_rate=0.3, pretrained_window_sizes=[4, 4, 4, 2])
    config = import_transformers(exported).encoder.config
    assert config.drop_path == 0.3
    assert config.pretrained_window_sizes == ((4, 4), (4, 4), (4, 4), (2, 2))
    change(exported, swinv2_encoder={"embed_dim": "wide"})
    assert import_transformers(exported).encoder.config == config


@pytest.mark.parametrize("folder", [".", "masked-image-modeling", "image-classification"])
def test_the_class_follows_from_the_tensors_if_the_config_lacks_it(
    exported: Path, folder: str
) -> None:
    change(exported / folder, architectures=None)
    imported = import_transformers(exported / folder)
    assert (imported.head is not None) == (folder == "masked-image-modeling")
    assert (imported.classifier is not None) == (folder == "image-classification")


def test_a_config_without_fields_has_the_defaults_of_transformers() -> None:
    parsed = parse_config({"model_type": "swinv2"}, [], "config.json")
    assert parsed.model == "Swinv2Model"
    assert (parsed.architecture["variant"], parsed.drop_path) == ("tiny", 0.1)
    assert (parsed.sizes.image_size, parsed.sizes.window_size) == ((224, 224), (7, 7))


@peer
def test_the_defaults_equal_the_installed_transformers() -> None:
    from swinv2.bridges.transformers_layout import _DEFAULTS

    transformers = pytest.importorskip("transformers")
    config = transformers.Swinv2Config()
    assert {name: getattr(config, name) for name in _DEFAULTS} == _DEFAULTS
