"""Folders of transformers: each class is read whole, and what we are not is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swinv2 import SwinV2, build_encoder
from swinv2.bridges.contents import BridgeError, Classifier, MaskedImageHead
from swinv2.bridges.reference import import_reference
from swinv2.bridges.timm import import_timm
from swinv2.bridges.transformers import export_transformers, import_transformers
from swinv2.bridges.transformers_layout import read_their_config

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


def heads(encoder: SwinV2) -> dict[str, Any]:
    channels = encoder.strides[-1] ** 2 * encoder.config.in_channels
    return {
        "head": MaskedImageHead(
            mask_token=draw(1, 1, 1, encoder.config.embed_dim),
            weight=draw(channels, encoder.num_features, 1, 1),
            bias=draw(channels),
        ),
        "classifier": Classifier(weight=draw(5, encoder.num_features), bias=draw(5)),
    }


def export(encoder: SwinV2, path: Path, **more: Any) -> Path:
    channels = encoder.config.in_channels
    mean, std = (MEAN * 2)[:channels], (STD * 2)[:channels]
    return export_transformers(encoder, path, mean=mean, std=std, **more)


def change(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    content |= fields
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture
def exported(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export with every class, without a look at transformers."""
    monkeypatch.setattr("swinv2.bridges.transformers.find_spec", lambda name: None)
    encoder = build()
    return export(encoder, tmp_path / "export", **heads(encoder))


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
    assert_same_weights: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
) -> None:
    monkeypatch.setattr("swinv2.bridges.transformers.find_spec", lambda name: None)
    encoder = build(**changed)
    given = heads(encoder)
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
            for part, tensor in vars(given[name]).items() if head is not None else ():
                assert torch.equal(getattr(head, part), tensor), part
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
def test_what_save_pretrained_wrote_is_read(tmp_path: Path, name: str, stored: str) -> None:
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
def test_windows_of_zero_are_the_present_ones(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model: Any = peer_model(transformers, "Swinv2Model", pretrained_window_sizes=[6, 0, 3])
    model.save_pretrained(tmp_path)
    encoder = import_transformers(tmp_path, mean=MEAN, std=STD).encoder
    assert encoder.config.pretrained_window_sizes == ((6, 6), (4, 4), (3, 3))
    images = draw(1, 3, 64, 64)
    with torch.no_grad():
        theirs, ours = model(images).last_hidden_state, encoder(images).flatten(1, 2)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_changed_config_is_not_overruled_by_what_was_recorded(exported: Path) -> None:
    change(exported, drop_path_rate=0.3, pretrained_window_sizes=[4, 4, 4, 2])
    config = import_transformers(exported).encoder.config
    assert config.drop_path == 0.3
    assert config.pretrained_window_sizes == ((4, 4), (4, 4), (4, 4), (2, 2))
    change(exported, swinv2_encoder={"embed_dim": "wide"})
    assert import_transformers(exported).encoder.config == config


def test_what_contradicts_the_folder_is_refused(exported: Path) -> None:
    assert import_transformers(exported, image_size=64, window_size=8, mean=STD).mean == STD
    with pytest.raises(BridgeError, match=r"image_size is \(96, 96\).* by its config.json"):
        import_transformers(exported, image_size=96)


LOST = "encoder.layers.1.blocks.1.attention.self.key.weight"
ADDED = "encoder.layers.1.blocks.1.attention.self.key.bias"
MISSHAPEN = "encoder.layers.2.blocks.0.layernorm_after.weight"


@pytest.mark.parametrize("stored", ["safetensors", "pickle"])
@pytest.mark.parametrize("folder", [".", "backbone", "masked-image-modeling"])
def test_every_tensor_that_does_not_fit_is_named(exported: Path, folder: str, stored: str) -> None:
    place = exported / folder
    prefix = "swinv2." if folder == "masked-image-modeling" else ""
    tensors = load_file(place / "model.safetensors")
    del tensors[prefix + LOST]
    tensors[prefix + ADDED] = torch.zeros(16)
    tensors[prefix + MISSHAPEN] = torch.zeros(31)
    (place / "model.safetensors").unlink()
    if stored == "pickle":
        torch.save(tensors, place / "pytorch_model.bin")
    else:
        save_file(tensors, place / "model.safetensors")
    with pytest.raises(BridgeError) as caught:
        import_transformers(place)
    assert str(caught.value).split("\n  ")[1:] == [
        f"missing: {prefix}{LOST}",
        f"unexpected: {prefix}{ADDED}",
        f"shape of {prefix}{MISSHAPEN}: (31,), expected (32,)",
    ]


@pytest.mark.parametrize(
    ("folder", "lost"),
    [
        (".", "layernorm.weight"),
        ("masked-image-modeling", "swinv2.embeddings.mask_token"),
        ("masked-image-modeling", "decoder.0.bias"),
        ("image-classification", "classifier.weight"),
        ("image-classification", "swinv2.layernorm.bias"),
    ],
)
def test_a_model_has_to_be_whole(exported: Path, folder: str, lost: str) -> None:
    file = exported / folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(BridgeError, match=f"missing: {lost}"):
        import_transformers(exported / folder)


def test_a_backbone_with_a_final_norm_is_refused(exported: Path) -> None:
    shutil.copy(exported / "model.safetensors", exported / "backbone" / "model.safetensors")
    with pytest.raises(BridgeError, match=r"unexpected: layernorm\.weight"):
        import_transformers(exported / "backbone")


@pytest.mark.parametrize("folder", [".", "masked-image-modeling", "image-classification"])
def test_the_tensors_tell_the_class_where_the_config_does_not(exported: Path, folder: str) -> None:
    change(exported / folder, architectures=None)
    imported = import_transformers(exported / folder)
    assert (imported.head is not None) == (folder == "masked-image-modeling")
    assert (imported.classifier is not None) == (folder == "image-classification")


def test_a_pickle_that_runs_code_is_refused(exported: Path, malicious: tuple[Path, Path]) -> None:
    file, folder = malicious
    (exported / "model.safetensors").unlink()
    shutil.copy(file, exported / "pytorch_model.bin")
    with pytest.raises(BridgeError, match=r"mkdir.*would run code"):
        import_transformers(exported)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "relu"}, r"hidden_act is 'relu', and this encoder has 'gelu': .*another"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings is True"),
        ({"qkv_bias": False}, "qkv_bias is False.*biases of zeros"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06, and this encoder has 1e-05"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob is 0.1.*write 0.0"),
        ({"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob is 0.1"),
        ({"pretrained_window_sizes": [4, 4, 4, 1]}, "divides by one less: write 2 for 1"),
        ({"pretrained_window_sizes": [4, 4]}, "names 2 of 4 stages"),
        ({"patch_size": [4, 8]}, r"patch_size is \[4, 8\], and patches here are square"),
        ({"num_heads": [1, 1, 2, 3]}, "num_heads"),
        ({"embed_dim": "eight"}, "cannot be used"),
        ({"architectures": ["Swinv2ForDepth"]}, "Swinv2ForDepth.*give a folder of one of"),
        ({"model_type": "swin"}, "model_type 'swin' .a Swin Transformer V1."),
        ({"model_type": "vit"}, "model_type 'vit', and a Swin Transformer V2"),
        ({"image_size": 96}, r"window_size 8 this encoder computes something else(.|\n)*padding"),
    ],
)
def test_a_config_that_we_cannot_be_is_refused(
    exported: Path, fields: dict[str, Any], message: str
) -> None:
    change(exported, **fields)
    with pytest.raises(BridgeError, match=message):
        import_transformers(exported)


def test_all_fields_that_do_not_fit_are_listed(exported: Path) -> None:
    change(exported, hidden_act="relu", qkv_bias=False)
    with pytest.raises(BridgeError) as caught:
        import_transformers(exported)
    assert "hidden_act" in str(caught.value)
    assert "qkv_bias" in str(caught.value)


def test_the_stride_of_the_decoder_matters_where_there_is_one(exported: Path) -> None:
    for folder in (exported, exported / "masked-image-modeling"):
        change(folder, encoder_stride=16)
    assert import_transformers(exported)
    with pytest.raises(BridgeError, match="encoder_stride is 16, and this encoder has 32"):
        import_transformers(exported / "masked-image-modeling")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_normalize": False}, "do_normalize is false"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ({"image_mean": [0.5]}, "mean is .0.5. and the images have 3 channels"),
    ],
)
def test_a_processor_that_we_cannot_follow_is_refused(
    exported: Path, fields: dict[str, Any], message: str
) -> None:
    file = exported / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        import_transformers(exported)
    file.unlink()
    assert import_transformers(exported).mean == (0.485, 0.456, 0.406)


def test_a_config_without_fields_has_the_defaults_of_transformers() -> None:
    told = read_their_config({"model_type": "swinv2"}, [], "config.json")
    assert told.model == "Swinv2Model"
    assert (told.architecture["variant"], told.drop_path) == ("tiny", 0.1)
    assert (told.sizes.image_size, told.sizes.window_size) == ((224, 224), (7, 7))


@peer
def test_those_defaults_are_those_of_the_installed_transformers() -> None:
    from swinv2.bridges.transformers_layout import _DEFAULTS

    transformers = pytest.importorskip("transformers")
    config = transformers.Swinv2Config()
    assert {name: getattr(config, name) for name in _DEFAULTS} == _DEFAULTS


@peer
@pytest.mark.parametrize("name", ["Swin", "ViT"])
@pytest.mark.parametrize("disguised", [False, True])
def test_other_models_of_transformers_are_refused(
    tmp_path: Path, name: str, disguised: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {
        "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 32},
        "ViT": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    }[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**small))
    model.save_pretrained(tmp_path)
    message = f"model_type '{name.lower()}'"
    if disguised:
        change(tmp_path, model_type="swinv2", architectures=None)
        message = {"Swin": "Swin Transformer V1.*relative_position_bias_table", "ViT": "a ViT"}[
            name
        ]
    with pytest.raises(BridgeError, match=message):
        import_transformers(tmp_path)


def test_layouts_are_sent_to_their_own_format(
    build: Build, tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swinv2.bridges.reference import to_reference
    from swinv2.bridges.timm import export_timm

    for read in (import_reference, import_timm):
        with pytest.raises(BridgeError, match="import its folder with --format transformers"):
            read(exported / "masked-image-modeling" / "model.safetensors")
    export_timm(build(), tmp_path / "timm", mean=MEAN, std=STD)
    with pytest.raises(BridgeError, match="import it with --format timm"):
        import_transformers(tmp_path / "timm")
    save_file(to_reference(build()), exported / "model.safetensors")
    with pytest.raises(BridgeError, match="--format reference or --format timm"):
        import_transformers(exported)


def test_an_encoder_directory_is_no_folder_of_transformers(build: Build, tmp_path: Path) -> None:
    from swinv2 import save_encoder

    save_encoder(build(), tmp_path / "ours", mean=MEAN, std=STD)
    with pytest.raises(BridgeError, match="load_encoder reads it"):
        import_transformers(tmp_path / "ours")


def test_a_folder_that_is_not_whole_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"config.json does not exist: give a folder"):
        import_transformers(tmp_path / "nowhere")
    (exported / "model.safetensors").unlink()
    with pytest.raises(BridgeError, match=r"model.safetensors does not exist"):
        import_transformers(exported)
    index = exported / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(BridgeError, match=r"model-00001-of-00002.safetensors does not exist"):
        import_transformers(exported)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(BridgeError, match="does not name files beside it"):
        import_transformers(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(BridgeError, match="is not valid JSON"):
        import_transformers(exported)
