"""timm (importable without torchvision here), recorded tensor lists, and checkpoints for tests."""

import json
import os
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from stand_in import import_with_stand_in
from torch import nn

from swinv2 import SwinV2, SwinV2Config
from swinv2.bridges.checkpoints import ClassifierHead, MaskedImageHead
from swinv2.bridges.transformers import export_transformers

RECORDED = Path(__file__).with_name("timm_tensors.json")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, where it is installed."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed: its recorded tensors are tested, loading in it is not")
    return import_with_stand_in("timm")


@pytest.fixture(scope="session")
def timm_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors by model, recorded from timm 1.0.31 on the meta device, with 1000 classes."""
    recorded = json.loads(RECORDED.read_text())
    return {
        model: {
            re.sub(r"\{.*\}", str(number), name): tuple(shape)
            for name, shape in tensors.items()
            for number in _numbers(name)
        }
        for model, tensors in recorded.items()
    }


def _numbers(name: str) -> Iterator[int]:
    """Block numbers of a recorded name such as layers.0.blocks.{0-1}.x."""
    block = re.search(r"\{(\d+)-(\d+)\}", name)
    return iter(range(int(block[1]), int(block[2]) + 1) if block else (0,))


@pytest.fixture(scope="session")
def reference_shapes(
    timm_shapes: dict[str, dict[str, tuple[int, ...]]],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The published code's: a stage ends with merging, and the classifier is head."""

    def rename(name: str) -> str:
        name = name.replace("head.fc.", "head.")
        return re.sub(
            r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        )

    return {
        model: {rename(name): shape for name, shape in shapes.items()}
        for model, shapes in timm_shapes.items()
    }


@pytest.fixture
def build(randomise: Callable[[nn.Module], None]) -> Callable[..., SwinV2]:
    def build_small(**sizes: object) -> SwinV2:
        sizes = {
            "embed_dim": 8,
            "depths": (1, 2, 2, 1),
            "num_heads": (1, 1, 2, 4),
            "image_size": 64,
            "window_size": 8,
            **sizes,
        }
        encoder = SwinV2(SwinV2Config(**sizes))
        randomise(encoder)
        return encoder.eval()

    return build_small


@pytest.fixture
def assert_same_weights() -> Callable[[nn.Module, nn.Module], None]:
    def check(one: nn.Module, other: nn.Module) -> None:
        first, second = one.state_dict(), other.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    return check


class RunsCode:
    """A pickle of it makes a folder when it is read without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def malicious(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint that runs code when it is read, and the folder that this would make."""
    file, folder = tmp_path / "malicious.pth", tmp_path / "made by the pickle"
    torch.save({"model": {"patch_embed.proj.weight": RunsCode(folder)}}, file)
    return file, folder


def swin_v1_tensors() -> dict[str, torch.Tensor]:
    block = "layers.0.blocks.0.attn."
    return {
        "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        f"{block}relative_position_bias_table": torch.zeros(49, 1),
        f"{block}relative_position_index": torch.zeros(16, 16),
        f"{block}qkv.weight": torch.zeros(24, 8),
        f"{block}qkv.bias": torch.zeros(24),
    }


def vit_tensors() -> dict[str, torch.Tensor]:
    return {
        "cls_token": torch.zeros(1, 1, 8),
        "pos_embed": torch.zeros(1, 5, 8),
        "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        "blocks.0.attn.qkv.weight": torch.zeros(24, 8),
    }


def beit_tensors() -> dict[str, torch.Tensor]:
    table = {"blocks.0.attn.relative_position_bias_table": torch.zeros(732, 1)}
    return table | {"cls_token": torch.zeros(1, 1, 8)}


def swinv2_cr_tensors() -> dict[str, torch.Tensor]:
    block = "stages.0.blocks.0.attn."
    return {
        "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        f"{block}logit_scale": torch.zeros(1),
        f"{block}meta_mlp.fc1.weight": torch.zeros(384, 2),
    }


OTHER_MODELS = {
    "swin-v1": (swin_v1_tensors, "Swin Transformer V1.*relative_position_bias_table"),
    "vit": (vit_tensors, "a ViT"),
    "beit": (beit_tensors, "a ViT"),
    "swinv2-cr": (swinv2_cr_tensors, "swinv2_cr of timm.*meta_mlp"),
    "torchvision": (
        lambda: {"features.1.0.attn.logit_scale": torch.zeros(1, 1, 1)},
        "a model of torchvision .*--format torchvision",
    ),
    "mmpretrain": (
        lambda: {"backbone.stages.0.blocks.0.attn.w_msa.logit_scale": torch.zeros(1, 1, 1)},
        "a model of mmpretrain .*--format mmpretrain",
    ),
    "other names": (
        lambda: {"stem.0.attn.logit_scale": torch.zeros(1, 1, 1)},
        r"under other names \(it begins with stem\.0\.attn\.logit_scale",
    ),
    "resnet": (lambda: {"conv1.weight": torch.zeros(1)}, "not a Swin Transformer V2.*conv1.weight"),
    "transformers": (
        lambda: (
            {"encoder.layers.0.blocks.0.attention.self.logit_scale": torch.zeros(1)}
            | {"embeddings.norm.weight": torch.zeros(1)}
        ),
        "transformers",
    ),
    "ours": (lambda: {"stages.0.blocks.0.attention.logit_scale": torch.zeros(1)}, "load_encoder"),
}


@pytest.fixture(params=OTHER_MODELS)
def other_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint of another architecture, and what the refusal says."""
    tensors, reason = OTHER_MODELS[request.param]
    file = tmp_path / "other.pth"
    torch.save({"model": tensors()}, file)
    return file, reason


def spoil_missing(tensors: dict[str, torch.Tensor]) -> str:
    del tensors["layers.1.blocks.1.attn.cpb_mlp.0.bias"]
    return r"missing: layers\.1\.blocks\.1\.attn\.cpb_mlp\.0\.bias"


def spoil_extra(tensors: dict[str, torch.Tensor]) -> str:
    tensors["layers.2.blocks.1.norm3.weight"] = torch.zeros(32)
    return r"unexpected: layers\.2\.blocks\.1\.norm3\.weight"


def spoil_shape(tensors: dict[str, torch.Tensor]) -> str:
    tensors["layers.2.blocks.1.norm2.weight"] = torch.zeros(31)
    return r"shape of layers\.2\.blocks\.1\.norm2\.weight: \(31,\), expected \(32,\)"


def spoil_what_tells_sizes(tensors: dict[str, torch.Tensor]) -> str:
    del tensors["patch_embed.proj.weight"]
    return r"missing: patch_embed\.proj\.weight"


@pytest.fixture(params=[spoil_missing, spoil_extra, spoil_shape, spoil_what_tells_sizes])
def spoil(request: pytest.FixtureRequest) -> Callable[[dict[str, torch.Tensor]], str]:
    """Spoils a checkpoint of the encoder of `build`, and gives what the refusal says."""
    return request.param


def heads_of(encoder: SwinV2) -> dict[str, Any]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    channels = encoder.strides[-1] ** 2 * encoder.config.in_channels
    return {
        "head": MaskedImageHead(
            mask_token=draw(1, 1, 1, encoder.config.embed_dim),
            weight=draw(channels, encoder.num_features, 1, 1),
            bias=draw(channels),
            norm_target=True,
        ),
        "classifier": ClassifierHead(weight=draw(5, encoder.num_features), bias=draw(5)),
    }


@pytest.fixture
def draw_heads() -> Callable[[SwinV2], dict[str, Any]]:
    """Draws decoder and classifier of an encoder."""
    return heads_of


@pytest.fixture
def exported(build: Callable[..., SwinV2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export with every class of transformers, written as if that were not installed."""
    monkeypatch.setattr("swinv2.bridges.transformers.find_spec", lambda name: None)
    encoder, mean, std = build(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return export_transformers(
        encoder, tmp_path / "export", mean=mean, std=std, **heads_of(encoder)
    )
