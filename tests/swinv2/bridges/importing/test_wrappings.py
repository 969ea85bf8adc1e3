"""What people's files have around a model's tensors: every wrapping imports with equal tensors."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from swinv2 import SwinV2
from swinv2.bridges.checkpoints import BridgeError, ImportedEncoder
from swinv2.bridges.importing.detection import detect_library
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.importing.reading import read_checkpoint
from swinv2.bridges.reference import import_reference, to_reference
from swinv2.bridges.timm import import_timm, to_timm
from swinv2.bridges.transformers import export_transformers, import_transformers, to_transformers

SIZES: dict[str, Any] = {"image_size": 64, "window_size": 8, "pretrained_window_sizes": "same"}
Build = Callable[..., SwinV2]
Same = Callable[[nn.Module, nn.Module], None]
Tensors = dict[str, Tensor]

NAMES = {
    "module": lambda name: f"module.{name}",
    "module inside": lambda name: name.replace("blocks.", "blocks.module."),
    "compiled": lambda name: name.replace(".attn", "._orig_mod.attn"),
    "checkpointed": lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "backbone": lambda name: f"backbone.{name}",
    "encoder": lambda name: f"encoder.{name}",
    "model": lambda name: f"model.{name}",
    "both": lambda name: f"_orig_mod.module.model.backbone.{name}",
}


def taken(found: ImportedEncoder) -> str:
    return next(note for note in found.notes if note.startswith("weights:"))


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("safe", [False, True], ids=["pickle", "safetensors"])
def test_wrapped_names(
    build: Build, assert_same_weights: Same, tmp_path: Path, names: str, safe: bool
) -> None:
    encoder = build()
    wrapped = {NAMES[names](name): part for name, part in to_reference(encoder).items()}
    assert wrapped.keys() != to_reference(encoder).keys()
    file = tmp_path / ("a.safetensors" if safe else "a.pth")
    save_file(wrapped, file) if safe else torch.save({"state_dict": wrapped}, file)
    assert_same_weights(encoder, import_reference(file, ImportOptions(**SIZES)).encoder)
    assert detect_library(file) == "reference"


def test_a_prefix_leaves_other_tensors_out_and_says_so(
    build: Build, assert_same_weights: Same, tmp_path: Path
) -> None:
    encoder = build()
    tensors = {f"backbone.{name}": part for name, part in to_reference(encoder).items()}
    tensors |= {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight": torch.zeros(1)}
    torch.save({"model": tensors}, tmp_path / "a.pth")
    found = import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))
    assert_same_weights(encoder, found.encoder)
    assert "names: without the prefix backbone." in found.notes
    expected = "2 tensors beside the encoder (head.mlp.0.weight, head.last_layer.weight)"
    assert f"not imported: {expected}" in found.notes


def test_a_simmim_model_below_a_prefix_keeps_its_head(
    build: Build,
    assert_same_weights: Same,
    draw_heads: Callable[[SwinV2], dict[str, Any]],
    tmp_path: Path,
) -> None:
    encoder = build()
    head = draw_heads(encoder)["head"]
    tensors = {f"module.model.{k}": v for k, v in to_reference(encoder, head=head).items()}
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    found = import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))
    assert_same_weights(encoder, found.encoder)
    assert found.head is not None
    assert torch.equal(found.head.mask_token, head.mask_token)
    assert torch.equal(found.head.weight, head.weight)


def test_names_that_differ_only_by_a_wrapping_are_refused(build: Build, tmp_path: Path) -> None:
    tensors = to_reference(build())
    tensors |= {"module.norm.weight": tensors["norm.weight"] + 1}
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=r"norm\.weight and module\.norm\.weight, the same name"):
        import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))


def test_an_averaged_model_of_torch(
    build: Build, assert_same_weights: Same, tmp_path: Path
) -> None:
    encoder = build()
    averaged = AveragedModel(encoder)
    averaged.update_parameters(encoder)
    named = {name: averaged.state_dict()[name] for name in ("n_averaged",)} | {
        f"module.{name}": part for name, part in to_reference(encoder).items()
    }
    torch.save(named, tmp_path / "a.pth")
    found = import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))
    assert_same_weights(encoder, found.encoder)
    assert taken(found) == "weights: averaged; the file has no raw ones"
    with pytest.raises(BridgeError, match="no raw weights, only averaged"):
        import_reference(tmp_path / "a.pth", ImportOptions(weights="raw", **SIZES))


def files_of_each_format(
    raw: SwinV2, averaged: SwinV2, folder: Path
) -> dict[str, tuple[Callable[..., ImportedEncoder], Path, dict[str, Any]]]:
    """Write a file with raw and averaged weights in every format; return how it is read."""
    normalisation = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    there = export_transformers(raw, folder / "transformers", **normalisation)
    (there / "model.safetensors").unlink()
    for name, (layout, file) in {
        "reference": (to_reference, folder / "reference.pth"),
        "timm": (to_timm, folder / "timm.pth"),
        "transformers": (to_transformers, there / "pytorch_model.bin"),
    }.items():
        del name
        content = {"model": layout(raw), "model_ema": layout(averaged), "epoch": 3}
        torch.save(content, file)
    return {
        "reference": (import_reference, folder / "reference.pth", SIZES),
        "timm": (import_timm, folder / "timm.pth", SIZES),
        "transformers": (import_transformers, there, {}),
    }


@pytest.mark.parametrize("form", ["reference", "timm", "transformers"])
def test_averaged_weights_are_taken_by_one_rule_and_it_is_said(
    build: Build,
    assert_same_weights: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    monkeypatch.setattr("swinv2.bridges.transformers.find_spec", lambda name: None)
    raw, averaged = build(), build()
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.5)
    read, file, sizes = files_of_each_format(raw, averaged, tmp_path)[form]
    found = read(file, ImportOptions(**sizes))
    assert_same_weights(averaged, found.encoder)
    assert taken(found) == "weights: averaged (model_ema); --weights raw takes model"
    found = read(file, ImportOptions(weights="raw", **sizes))
    assert_same_weights(raw, found.encoder)
    assert taken(found) == "weights: raw (model); --weights averaged takes model_ema"
    assert_same_weights(raw, read(file, ImportOptions(key="model", **sizes)).encoder)


@pytest.mark.parametrize("flat", [False, True], ids=["entries", "prefixes"])
def test_student_and_teacher(
    build: Build, assert_same_weights: Same, tmp_path: Path, flat: bool
) -> None:
    student, teacher = build(), build()
    with torch.no_grad():
        teacher.norm.weight.mul_(2)
    head = {"head.mlp.0.weight": torch.ones(2)}
    models = {
        "student": {f"module.backbone.{k}": v for k, v in to_reference(student).items()} | head,
        "teacher": {f"backbone.{k}": v for k, v in to_reference(teacher).items()} | head,
    }
    content: dict[str, Any] = models | {"epoch": 3}
    if flat:
        named = {f"{who}.{k}": v for who, model in models.items() for k, v in model.items()}
        content = {"state_dict": named}
    torch.save(content, tmp_path / "dino.pth")
    found = import_reference(tmp_path / "dino.pth", ImportOptions(**SIZES))
    assert_same_weights(teacher, found.encoder)
    assert "teacher.backbone" in taken(found)
    for who, encoder in (("student", student), ("teacher", teacher)):
        chosen = import_reference(tmp_path / "dino.pth", ImportOptions(key=who, **SIZES))
        assert_same_weights(encoder, chosen.encoder)
    with pytest.raises(BridgeError, match=r"no model 'tutor': give one of .*student\.backbone"):
        import_reference(tmp_path / "dino.pth", ImportOptions(key="tutor", **SIZES))


def test_one_of_several_models_is_asked_for(
    build: Build, assert_same_weights: Same, tmp_path: Path
) -> None:
    one, other = build(), build()
    with torch.no_grad():
        other.norm.bias.add_(1)
    content = {"fold1": to_reference(one), "nested": {"fold2": to_reference(other)}}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=r"several models, fold1, nested\.fold2: .*--key fold1"):
        import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))
    assert_same_weights(
        one, import_reference(tmp_path / "a.pth", ImportOptions(key="fold1", **SIZES)).encoder
    )
    assert_same_weights(
        other, import_reference(tmp_path / "a.pth", ImportOptions(key="fold2", **SIZES)).encoder
    )


SCALARS: dict[str, Any] = {
    "top1": np.float64(84.5),
    "best": np.float32(0.5),
    "epoch": np.int64(7),
    "done": np.bool_(True),
    "name": np.str_("swin"),
    "swapped": np.dtype(">f8").type(1.5),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
def test_numpy_scalars_are_plain_values(
    build: Build, assert_same_weights: Same, tmp_path: Path, old: bool
) -> None:
    encoder, file = build(), tmp_path / "a.pth"
    content = {"model": to_reference(encoder), **SCALARS, "args": Namespace(lr=np.float64(0.1))}
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    assert_same_weights(encoder, import_reference(file, ImportOptions(**SIZES)).encoder)
    extras = read_checkpoint(file).extras
    assert {name: extras[name] for name in SCALARS} == SCALARS
    assert all(not isinstance(extras[name], np.generic) for name in SCALARS)
    assert extras["args"].lr == 0.1


def test_scalars_of_numpy_1_are_read_too(
    build: Build, assert_same_weights: Same, tmp_path: Path
) -> None:
    encoder, file = build(), tmp_path / "a.pth"
    content = {"model": to_reference(encoder), "top1": np.float64(84.5)}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    renamed = file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert renamed != file.read_bytes()
    file.write_bytes(renamed)
    assert_same_weights(encoder, import_reference(file, ImportOptions(**SIZES)).encoder)
    assert read_checkpoint(file).extras["top1"] == 84.5


def test_other_values_of_numpy_are_refused_by_name(build: Build, tmp_path: Path) -> None:
    for value, name in (
        (np.zeros(3), r"numpy\S*_reconstruct"),
        (np.datetime64("2020-01-01"), "numpy.M8"),
    ):
        torch.save({"model": to_reference(build()), "x": value}, tmp_path / "a.pth")
        with pytest.raises(BridgeError, match=f"holds {name}, and reading that would run code"):
            import_reference(tmp_path / "a.pth", ImportOptions(**SIZES))


class Bomb:
    """A scalar of a type that claims to be large, and has no bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        scalar = np.float64(1).__reduce__()[0]
        return scalar, (np.dtype("V2000000000"),)


def test_a_large_scalar_is_not_allocated(tmp_path: Path) -> None:
    torch.save({"model": {"a.logit_scale": torch.ones(1)}, "x": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=r"numpy\.V2000000000"):
        read_checkpoint(tmp_path / "a.pth")


FEATURES = {
    "rewritten": lambda name: name.replace("layers.", "layers_", 1),
    "getter": lambda name: f"model.{name}",
}
"""Names in timm's two classes for `features_only`."""


@pytest.mark.parametrize("stages", [4, 3])
@pytest.mark.parametrize("names", FEATURES)
def test_features_only_of_timm(
    build: Build, assert_same_weights: Same, tmp_path: Path, stages: int, names: str
) -> None:
    encoder = build(depths=(1, 2, 2, 1)[:stages], num_heads=(1, 1, 2, 4)[:stages])
    tensors = {
        FEATURES[names](name): part
        for name, part in to_timm(encoder).items()
        if not name.startswith("norm.")
    }
    save_file(tensors, tmp_path / "features.safetensors")
    assert detect_library(tmp_path / "features.safetensors") == "timm"
    found = import_timm(tmp_path / "features.safetensors", ImportOptions(**SIZES))
    assert found.fresh == ("norm.weight", "norm.bias")
    nn.init.ones_(encoder.norm.weight)
    nn.init.zeros_(encoder.norm.bias)
    assert_same_weights(encoder, found.encoder)
    del tensors[FEATURES[names]("layers.1.blocks.0.norm1.bias")]
    save_file(tensors, tmp_path / "features.safetensors")
    with pytest.raises(BridgeError, match=r"missing: layers\.1\.blocks\.0\.norm1\.bias"):
        import_timm(tmp_path / "features.safetensors", ImportOptions(**SIZES))
