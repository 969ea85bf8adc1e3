"""Exports load in transformers; encoders that it cannot compute are refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from swinv2 import SwinV2, build_encoder
from swinv2.bridges.checkpoints import BridgeError, ClassifierHead, MaskedImageHead
from swinv2.bridges.transformers import export_transformers, import_transformers
from swinv2.bridges.transformers_layout import transformers_config
from swinv2.bridges.verification import check_transformers_export

peer = pytest.mark.peer
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def draw_classifier(encoder: SwinV2, classes: int = 5) -> ClassifierHead:
    generator = torch.Generator().manual_seed(8)
    return ClassifierHead(
        weight=torch.randn(classes, encoder.num_features, generator=generator),
        bias=torch.randn(classes, generator=generator),
    )


def draw_head(encoder: SwinV2) -> MaskedImageHead:
    generator = torch.Generator().manual_seed(7)
    channels = encoder.strides[-1] ** 2 * encoder.config.in_channels
    return MaskedImageHead(
        mask_token=torch.randn(1, 1, 1, encoder.config.embed_dim, generator=generator),
        weight=torch.randn(channels, encoder.num_features, 1, 1, generator=generator),
        bias=torch.randn(channels, generator=generator),
    )


def reconstruct(
    encoder: SwinV2, head: MaskedImageHead, images: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """SimMIM by hand: (reconstruction, loss) for a mask of tokens (batch, rows, columns)."""
    tokens = encoder.embed(images)
    tokens = torch.where(hidden[..., None], head.mask_token, tokens)
    features = encoder.encode(tokens).permute(0, 3, 1, 2)
    reconstruction = F.pixel_shuffle(
        F.conv2d(features, head.weight, head.bias), encoder.strides[-1]
    )
    patch = encoder.config.patch_size
    pixels = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    distance = ((images - reconstruction).abs() * pixels).sum()
    return reconstruction, distance / (pixels.sum() + 1e-5) / encoder.config.in_channels


@peer
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"image_size": 32, "patch_size": 2},
        {"image_size": 32},
        {"in_channels": 1},
        {"in_channels": 4},
        {"pretrained_window_sizes": ((4, 4), (4, 4), (2, 2), (1, 1))},
    ],
    ids=["plain", "patch-2", "last-stage-1x1", "grey", "four-channels", "transferred"],
)
def test_every_folder_loads_strictly_and_computes_the_same(
    build: Callable[..., SwinV2], tmp_path: Path, sizes: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = build(**sizes)
    channels = encoder.config.in_channels
    head, classifier = draw_head(encoder), draw_classifier(encoder)
    path = export_transformers(
        encoder,
        tmp_path / "export",
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        head=head,
        classifier=classifier,
    )
    models = {}
    for folder, name in (
        (path, "Swinv2Model"),
        (path / "backbone", "Swinv2Backbone"),
        (path / "masked-image-modeling", "Swinv2ForMaskedImageModeling"),
        (path / "image-classification", "Swinv2ForImageClassification"),
    ):
        models[name], report = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(report.values()), (name, report)

    size = encoder.config.image_size[0]
    tokens = size // encoder.config.patch_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, channels, size, size, generator=generator)
    hidden = torch.rand(2, tokens, tokens, generator=generator) < 0.6
    with torch.no_grad():
        features = encoder.features(images)
        theirs = models["Swinv2Model"](images)
        maps = models["Swinv2Backbone"](images).feature_maps
        masked = models["Swinv2ForMaskedImageModeling"](images, bool_masked_pos=hidden.flatten(1))
        reconstruction, loss = reconstruct(encoder, head, images, hidden)
        logits = models["Swinv2ForImageClassification"](images).logits
    pooled = features[-1].mean((2, 3))
    torch.testing.assert_close(
        pooled @ classifier.weight.T + classifier.bias, logits, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        features[-1].flatten(2).transpose(1, 2), theirs.last_hidden_state, rtol=1e-4, atol=1e-5
    )
    assert len(maps) == 4
    for ours, their_map in zip(features[:-1], maps[:-1], strict=True):
        torch.testing.assert_close(ours, their_map, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reconstruction, masked.reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, masked.loss, rtol=1e-5, atol=0)


@peer
def test_a_classifier_has_the_names_of_its_classes(
    build: Callable[..., SwinV2], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    encoder, names = build(), ("cat", "dog", "cat's whisker")
    options: dict[str, Any] = {"mean": MEAN, "std": STD, "classifier": draw_classifier(encoder, 3)}
    path = export_transformers(encoder, tmp_path / "out", **options, classes=names)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        path / "image-classification"
    )
    assert model.config.id2label == dict(enumerate(names))
    assert import_transformers(path / "image-classification").classes == names
    export_transformers(encoder, path, **options)
    assert import_transformers(path / "image-classification").classes == ()
    with pytest.raises(BridgeError, match="2 names for 3 classes"):
        export_transformers(encoder, path, **options, classes=names[:2])


@peer
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_readme_example_loads_it(
    build: Callable[..., SwinV2],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
) -> None:
    pytest.importorskip("transformers")
    encoder = build(in_channels=channels)
    mean = tuple(0.1 * (channel + 1) for channel in range(channels))
    path = export_transformers(
        encoder,
        tmp_path / "export",
        mean=mean,
        std=(0.5,) * channels,
        head=draw_head(encoder),
        classifier=draw_classifier(encoder),
    )
    text = (path / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    call = re.search(r"`model\(\*\*(processor\(.*?\))\)`", text)
    assert call is not None
    monkeypatch.chdir(path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, channels), dtype=np.uint8)
    image = pixels if channels != 1 else Image.fromarray(pixels[..., 0])
    loaded = []
    for block in blocks:
        names: dict[str, Any] = {"image": image}
        exec(compile(block, "README", "exec"), names)
        prepared = eval(call[1], names)
        expected = (torch.from_numpy(pixels) / 255 - torch.tensor(mean)) / 0.5
        torch.testing.assert_close(
            prepared.pixel_values[0], expected.permute(2, 0, 1), rtol=1e-5, atol=1e-5
        )
        with torch.no_grad():
            loaded.append((names["model"], names["model"](**prepared)))
    kinds = ["", "Backbone", "ForMaskedImageModeling", "ForImageClassification"]
    assert [type(model).__name__ for model, _ in loaded] == [
        f"Swinv2{kind or 'Model'}" for kind in kinds
    ]
    with torch.no_grad():
        features = encoder(prepared.pixel_values).flatten(1, 2)
    torch.testing.assert_close(loaded[0][1].last_hidden_state, features, rtol=1e-4, atol=1e-5)


@peer
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("pretrained_window_sizes", "Swinv2Model's features"),
        ("window_size", "Swinv2Model's features"),
    ],
)
def test_an_export_that_differs_is_not_kept(
    build: Callable[..., SwinV2],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    named: str,
) -> None:
    pytest.importorskip("transformers")
    right = transformers_config(build())
    wrong = right | {broken: 4 if broken == "window_size" else [3, 3, 3, 3]}
    monkeypatch.setattr("swinv2.bridges.transformers.transformers_config", lambda encoder: wrong)
    monkeypatch.setattr("swinv2.bridges.transformers.check_read_back", lambda one, other: None)
    with pytest.raises(BridgeError, match=f"not exported: the largest difference of {named}"):
        export_transformers(build(), tmp_path / "export", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []


@peer
def test_every_class_is_compared_on_the_image_given(
    build: Callable[..., SwinV2], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    encoder, lines = build(), list[str]()
    export_transformers(
        encoder,
        tmp_path / "export",
        mean=MEAN,
        std=STD,
        head=draw_head(encoder),
        classifier=draw_classifier(encoder),
        images=torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        report=lines.append,
    )
    kinds = ["Model's features", "Backbone's maps", "ForMaskedImageModeling's reconstruction"]
    kinds.append("ForImageClassification's logits")
    assert [line.rpartition(":")[0] for line in lines] == [
        f"largest difference of Swinv2{kind} from ours" for kind in kinds
    ]
    assert all(0 < float(line.split()[-1]) < 1e-3 for line in lines)
    with pytest.raises(BridgeError, match="not finite"):
        export_transformers(
            encoder,
            tmp_path / "other",
            mean=MEAN,
            std=STD,
            images=torch.full((1, 3, 64, 64), torch.nan),
        )
    assert not (tmp_path / "other").exists()


@peer
def test_a_half_precision_encoder_is_compared_in_float32(
    build: Callable[..., SwinV2], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    encoder, lines = build().to(torch.bfloat16), list[str]()
    path = export_transformers(
        encoder, tmp_path / "export", mean=MEAN, std=STD, report=lines.append
    )
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(float(line.split()[-1]) < 1e-4 for line in lines)


@peer
def test_auto_model_and_the_image_processor_load(
    build: Callable[..., SwinV2], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    path = export_transformers(build(), tmp_path / "export", mean=MEAN, std=STD)
    assert isinstance(transformers.AutoModel.from_pretrained(path), transformers.Swinv2Model)
    assert not (path / "masked-image-modeling").exists()

    processor = transformers.AutoImageProcessor.from_pretrained(path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    prepared = processor(images=Image.fromarray(pixels), return_tensors="pt").pixel_values
    expected = (torch.from_numpy(pixels) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(prepared[0], expected.permute(2, 0, 1), rtol=1e-5, atol=1e-5)


def test_export_needs_no_transformers(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
from swinv2 import SwinV2, SwinV2Config
from swinv2.bridges.transformers import export_transformers
config = SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 1), image_size=32, window_size=4)
export_transformers(SwinV2(config), sys.argv[1], mean=(0.5,) * 3, std=(0.5,) * 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "export")],
        timeout=120,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {place.name for place in (tmp_path / "export").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "backbone",
    }


def test_only_an_earlier_export_is_replaced(build: Callable[..., SwinV2], tmp_path: Path) -> None:
    path = export_transformers(build(), tmp_path / "export", mean=MEAN, std=STD)
    export_transformers(build(window_size=4), path, mean=MEAN, std=STD)
    assert json.loads((path / "config.json").read_text())["window_size"] == 4
    for file in (path / "backbone" / "notes.txt", path / "notes.txt"):
        file.touch()
        with pytest.raises(ValueError, match="not replaced"):
            export_transformers(build(), path, mean=MEAN, std=STD)
        file.unlink()
    (path / "README.md").unlink()  # as early versions wrote it
    (path / "backbone" / "preprocessor_config.json").unlink()
    export_transformers(build(window_size=4), path, mean=MEAN, std=STD)
    assert json.loads((path / "config.json").read_text())["window_size"] == 4


@peer
def test_an_unexpected_tensor_is_refused(build: Callable[..., SwinV2], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = export_transformers(build(), tmp_path / "export", mean=MEAN, std=STD)
    check_transformers_export(path)
    tensors = load_file(path / "backbone" / "model.safetensors")
    tensors["layernorm.weight"] = torch.zeros(64)
    del tensors["embeddings.norm.bias"]
    save_file(tensors, path / "backbone" / "model.safetensors")
    with pytest.raises(BridgeError, match=r"embeddings\.norm\.bias, layernorm\.weight"):
        check_transformers_export(path)


def test_recorded_windows_are_exported(build: Callable[..., SwinV2]) -> None:
    encoder = build(image_size=192, window_size=12)
    assert transformers_config(encoder)["pretrained_window_sizes"] == [0, 0, 0, 0]
    encoder.set_input(image_size=256, window_size=16)
    assert transformers_config(encoder)["pretrained_window_sizes"] == [12, 12, 12, 6]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"window_size": (8, 4)}, "not square"),
        ({"image_size": (64, 96)}, "from the rows"),
        ({"image_size": 36}, "from the rows"),
        ({"image_size": 96, "window_size": 7}, "attends to the padding"),
        ({"extra_norm_every": 2}, "norm after every 2 blocks"),
        (
            {"pretrained_window_sizes": ((4, 8), (4, 4), (4, 4), (2, 2))},
            r"stage 1: pretraining window \(4, 8\)",
        ),
    ],
)
def test_an_encoder_unsupported_by_transformers_is_refused(
    build: Callable[..., SwinV2], tmp_path: Path, sizes: dict[str, object], reason: str
) -> None:
    with pytest.raises(BridgeError, match=reason):
        export_transformers(build(**sizes), tmp_path / "export", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []


def test_all_reasons_are_listed(build: Callable[..., SwinV2]) -> None:
    with pytest.raises(BridgeError) as caught:
        transformers_config(build(image_size=96, window_size=7, extra_norm_every=1))
    assert "norm after every 1" in str(caught.value)
    assert "stage 1 of 24x24 tokens" in str(caught.value)


def test_huge_is_refused_and_the_published_others_are_not() -> None:
    with torch.device("meta"):
        for name in ("tiny", "small", "base", "large"):
            assert transformers_config(build_encoder(name))["depths"][0] == 2
        with pytest.raises(BridgeError, match="norm after every 6"):
            transformers_config(build_encoder("huge"))


def test_a_head_of_another_encoder_is_refused(build: Callable[..., SwinV2], tmp_path: Path) -> None:
    other = draw_head(build(image_size=32, patch_size=2))
    with pytest.raises(BridgeError, match=r"weight is .*bias is"):
        export_transformers(build(), tmp_path / "export", mean=MEAN, std=STD, head=other)
    assert list(tmp_path.iterdir()) == []


def test_a_normalisation_that_does_not_fit_is_refused(
    build: Callable[..., SwinV2], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="mean"):
        export_transformers(build(), tmp_path / "export", mean=(0.5,), std=STD)
    assert list(tmp_path.iterdir()) == []
