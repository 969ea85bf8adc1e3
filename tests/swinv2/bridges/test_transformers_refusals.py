"""Incomplete folders of transformers, and unsupported models, are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swinv2 import SwinV2, save_encoder
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.reference import import_reference, to_reference
from swinv2.bridges.timm import export_timm, import_timm
from swinv2.bridges.transformers import import_transformers

peer = pytest.mark.peer
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
Build = Callable[..., SwinV2]
LOST = "encoder.layers.1.blocks.1.attention.self.key.weight"
ADDED = "encoder.layers.1.blocks.1.attention.self.key.bias"
MISSHAPEN = "encoder.layers.2.blocks.0.layernorm_after.weight"


def change(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    content |= fields
    (folder / "config.json").write_text(json.dumps(content))


def test_sizes_that_contradict_the_folder_are_refused(exported: Path) -> None:
    assert (
        import_transformers(exported, ImportOptions(image_size=64, window_size=8, mean=STD)).mean
        == STD
    )
    with pytest.raises(BridgeError, match=r"image_size is \(96, 96\).* its config.json"):
        import_transformers(exported, ImportOptions(image_size=96))


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
def test_missing_tensors_are_named(exported: Path, folder: str, lost: str) -> None:
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
        ({"pretrained_window_sizes": [4, 4, 4, 1]}, "pretrained_window_sizes.*write 2"),
        ({"pretrained_window_sizes": [4, 4]}, "2 of 4 stages"),
        ({"patch_size": [4, 8]}, r"patch_size is \[4, 8\], .*square"),
        ({"num_heads": [1, 1, 2, 3]}, "num_heads"),
        ({"embed_dim": "eight"}, "cannot be used"),
        ({"architectures": ["Swinv2ForDepth"]}, "Swinv2ForDepth.*give a folder of one of"),
        ({"model_type": "swin"}, "model_type 'swin' .a Swin Transformer V1."),
        ({"model_type": "vit"}, "model_type 'vit', and a Swin Transformer V2"),
        ({"image_size": 96}, r"window_size 8(.|\n)*padding"),
    ],
)
def test_an_unsupported_config_is_refused(
    exported: Path, fields: dict[str, Any], message: str
) -> None:
    change(exported, **fields)
    with pytest.raises(BridgeError, match=message):
        import_transformers(exported)


def test_all_unsupported_fields_are_listed(exported: Path) -> None:
    change(exported, hidden_act="relu", qkv_bias=False)
    with pytest.raises(BridgeError) as caught:
        import_transformers(exported)
    assert "hidden_act" in str(caught.value)
    assert "qkv_bias" in str(caught.value)


def test_the_encoder_stride_is_checked_if_there_is_a_decoder(exported: Path) -> None:
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
        ({"image_mean": [0.5]}, "mean is .0.5.,? and the images have 3 channels"),
    ],
)
def test_an_unsupported_image_processor_is_refused(
    exported: Path, fields: dict[str, Any], message: str
) -> None:
    file = exported / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        import_transformers(exported)
    file.unlink()
    assert import_transformers(exported).mean == (0.485, 0.456, 0.406)


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


def test_other_layouts_name_their_format(
    build: Build, tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for read in (import_reference, import_timm):
        with pytest.raises(BridgeError, match="import its folder with --format transformers"):
            read(exported / "masked-image-modeling" / "model.safetensors")
    export_timm(build(), tmp_path / "timm", mean=MEAN, std=STD)
    with pytest.raises(BridgeError, match="import it with --format timm"):
        import_transformers(tmp_path / "timm")
    save_file(to_reference(build()), exported / "model.safetensors")
    with pytest.raises(BridgeError, match="--format reference or --format timm"):
        import_transformers(exported)


def test_an_encoder_directory_is_refused(build: Build, tmp_path: Path) -> None:
    save_encoder(build(), tmp_path / "ours", mean=MEAN, std=STD)
    with pytest.raises(BridgeError, match="load_encoder"):
        import_transformers(tmp_path / "ours")


def test_missing_files_are_named(exported: Path, tmp_path: Path) -> None:
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
    with pytest.raises(BridgeError, match="does not name files"):
        import_transformers(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(BridgeError, match="is not valid JSON"):
        import_transformers(exported)
