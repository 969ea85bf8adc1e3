"""timm's swinv2 models: strict round trips, and equal outputs if timm can be imported."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from swinv2 import SwinV2, build_encoder, variant_config
from swinv2.bridges.checkpoints import BridgeError, ClassifierHead
from swinv2.bridges.conversion import load_renamed
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.layer_names import rename_tensor
from swinv2.bridges.reference import to_reference
from swinv2.bridges.timm import (
    export_timm,
    import_timm,
    timm_arguments,
    to_timm,
)
from swinv2.bridges.verification import find_timm, load_in_timm

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZES = {"image_size": 64, "window_size": 8, "pretrained_window_sizes": "same"}
TWELVE = ((12, 12), (12, 12), (12, 12), (6, 6))
RECORDED = {
    "tiny": "swinv2_tiny_window8_256",
    "small": "swinv2_small_window8_256",
    "base": "swinv2_base_window12_192",
    "large": "swinv2_large_window12_192",
}
SPLIT = partial(rename_tensor, merge_shift=1)
Build = Callable[..., SwinV2]
Same = Callable[[nn.Module, nn.Module], None]
Shapes = dict[str, dict[str, tuple[int, ...]]]
variants = pytest.mark.parametrize("variant", RECORDED)
shapes_of_models = pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"image_size": 32, "patch_size": 2, "drop_path": 0.2},
        {"image_size": 32},
        {"in_channels": 1, "mlp_ratio": 2.7},
        {"pretrained_window_sizes": ((4, 4), (4, 4), (2, 2), (1, 1))},
        {"image_size": (64, 128), "window_size": (8, 16)},
        {"image_size": (64, 128), "window_size": 16},
    ],
    ids=["plain", "patch-2", "last-stage-1x1", "grey", "transferred", "oblong", "clamped"],
)


def draw_classifier(encoder: SwinV2) -> ClassifierHead:
    generator = torch.Generator().manual_seed(8)
    return ClassifierHead(
        weight=torch.randn(5, encoder.num_features, generator=generator),
        bias=torch.randn(5, generator=generator),
    )


def normalisation(encoder: SwinV2) -> dict[str, Any]:
    channels = encoder.config.in_channels
    return {"mean": MEAN[:channels], "std": STD[:channels]}


def draw_images(encoder: SwinV2) -> Tensor:
    shape = (1, encoder.config.in_channels, *encoder.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@variants
def test_the_recorded_tensors_of_each_variant_map_one_to_one(
    timm_shapes: Shapes, variant: str
) -> None:
    shapes = timm_shapes[RECORDED[variant]]
    head = {name: shape for name, shape in shapes.items() if name.startswith("head.fc.")}
    assert head.keys() == {"head.fc.weight", "head.fc.bias"}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    encoder = load_renamed(tensors, variant_config(variant), SPLIT, source="list", head_shapes=head)
    assert len(encoder.state_dict()) == len(shapes) - 2


@pytest.mark.peer
@variants
def test_the_recorded_tensors_equal_the_installed_timms(
    timm: ModuleType, timm_shapes: Shapes, variant: str
) -> None:
    with torch.device("meta"):
        model = timm.create_model(RECORDED[variant], num_classes=1000)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == timm_shapes[RECORDED[variant]]


@shapes_of_models
def test_a_round_trip_is_bit_identical(
    build: Build, assert_same_weights: Same, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    encoder = build(**sizes)
    classifier = draw_classifier(encoder) if sizes else None
    path = export_timm(encoder, tmp_path / "out", **normalisation(encoder), classifier=classifier)
    back = import_timm(path)
    assert_same_weights(encoder, back.encoder)
    assert {"mean": back.mean, "std": back.std} == normalisation(encoder)
    assert back.encoder.config == encoder.config
    with torch.no_grad():
        assert torch.equal(encoder(draw_images(encoder)), back.encoder(draw_images(encoder)))
    assert (back.classifier is None) == (classifier is None)
    if classifier is not None and back.classifier is not None:
        assert torch.equal(classifier.weight, back.classifier.weight)
        assert torch.equal(classifier.bias, back.classifier.bias)


def assert_equal_in(timm: ModuleType, encoder: SwinV2, path: Path) -> None:
    export_timm(encoder, path, **normalisation(encoder))
    peer = load_in_timm(timm, path)
    images = draw_images(encoder)
    with torch.no_grad():
        ours = encoder.features(images)
        theirs = peer.forward_intermediates(images, norm=True, intermediates_only=True)
    for stage, (our_map, their_map) in enumerate(zip(ours, theirs, strict=True)):
        error = (our_map - their_map).norm() / our_map.norm()
        assert error <= 1e-5, f"stage {stage + 1}: {error:.1e}"


@pytest.mark.peer
@shapes_of_models
def test_timm_computes_the_same(
    build: Build, timm: ModuleType, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    assert_equal_in(timm, build(**sizes), tmp_path / "out")


@pytest.mark.peer
@pytest.mark.parametrize(
    ("image_size", "window_size", "pretrained"),
    [(192, 12, None), (256, 16, TWELVE), (256, 8, None), (384, 24, TWELVE)],
)
def test_timm_computes_the_same_at_published_sizes(
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
    assert_equal_in(timm, encoder, tmp_path / "out")


@pytest.mark.peer
def test_the_readme_says_how_features_are_taken(
    timm: ModuleType, build: Build, tmp_path: Path
) -> None:
    encoder, images = build(), torch.randn(2, 3, 64, 64)
    classifier = draw_classifier(encoder)
    path = export_timm(encoder, tmp_path / "out", **normalisation(encoder), classifier=classifier)
    text = (path / "README.md").read_text()
    load = partial(timm.create_model, f"local-dir:{path}", pretrained=True)
    assert '`timm.create_model("local-dir:FOLDER", pretrained=True)`' in text
    maps = encoder.features(images)
    assert "`num_classes=0`: `model(images)` is the average of the last map, (batch, 64)" in text
    torch.testing.assert_close(
        load(num_classes=0).eval()(images), maps[-1].mean((2, 3)), rtol=1e-3, atol=1e-4
    )
    assert "at\n  strides 4, 8, 16 and 32; `out_indices=(1, 3)` chooses some" in text
    *theirs, last = load(features_only=True).eval()(images)
    for one, other in zip(maps, theirs, strict=False):
        torch.testing.assert_close(other.permute(0, 3, 1, 2), one, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        encoder.norm(last).permute(0, 3, 1, 2), maps[-1], rtol=1e-3, atol=1e-4
    )
    assert len(load(features_only=True, out_indices=(1, 3)).eval()(images)) == 2


@pytest.mark.peer
@pytest.mark.parametrize("form", ["readme", "local-dir"])
def test_the_readme_example_loads_it(
    build: Build, timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    encoder = build()
    path = export_timm(encoder, tmp_path / "out", mean=MEAN, std=STD)
    if form == "readme":
        lines = re.search(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
        assert lines is not None
        monkeypatch.chdir(path)
        names: dict[str, Any] = {}
        exec(compile(lines[1], "README", "exec"), names)
        model = names["model"].eval()
    else:
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        assert tuple(model.pretrained_cfg["mean"]) == MEAN
    images = draw_images(encoder)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(images), encoder(images), rtol=1e-5, atol=1e-5
        )


@pytest.mark.peer
def test_a_model_of_timm_is_imported(build: Build, timm: ModuleType, tmp_path: Path) -> None:
    encoder = build(image_size=128, window_size=8)
    name, arguments = timm_arguments(encoder)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    # Old versions saved their buffers too, and training scripts a namespace of arguments.
    buffers = {key: part for key, part in model.named_buffers() if "k_bias" not in key}
    content = {"state_dict": model.state_dict() | buffers, "arch": name, "epoch": 3}
    torch.save(content, tmp_path / "model.pth")
    imported = import_timm(tmp_path / "model.pth")
    assert imported.encoder.config.image_size == (128, 128)
    assert set(imported.dropped) == buffers.keys()
    assert imported.classifier is not None
    images = draw_images(encoder)
    with torch.no_grad():
        features = imported.encoder(images)
        logits = features.mean((1, 2)) @ imported.classifier.weight.T + imported.classifier.bias
        torch.testing.assert_close(model.forward_features(images), features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.peer
def test_a_timm_with_other_tensors_is_refused(
    build: Build, timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def create_other(name: str, **arguments: Any) -> nn.Module:
        model: nn.Module = create(name, **arguments)
        model.layers[0].blocks[0].norm3 = nn.LayerNorm(8)
        return model

    monkeypatch.setattr(timm, "create_model", create_other)
    with pytest.raises(BridgeError, match=r"layers\.0\.blocks\.0\.norm3\.bias"):
        export_timm(build(), tmp_path / "out", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peer
def test_an_export_that_differs_in_timm_is_not_kept(
    build: Build, timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    encoder = build()
    options: dict[str, Any] = {"mean": MEAN, "std": STD, "classifier": draw_classifier(encoder)}
    export_timm(encoder, tmp_path / "out", **options, report=lines.append)
    assert [line.rpartition(":")[0] for line in lines] == [
        "largest difference of timm's features from ours",
        "largest difference of timm's logits from ours",
    ]
    name, arguments = timm_arguments(encoder)
    wrong = (name, arguments | {"pretrained_window_sizes": [3, 3, 3, 3]})
    monkeypatch.setattr("swinv2.bridges.timm.timm_arguments", lambda encoder: wrong)
    monkeypatch.setattr("swinv2.bridges.timm.check_read_back", lambda one, other: None)
    with pytest.raises(BridgeError, match="not exported: the largest difference of timm's feat"):
        export_timm(encoder, tmp_path / "other", **options)
    assert [place.name for place in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("variant", "sizes", "expected"),
    [
        ("tiny", {}, "swinv2_tiny_window8_256"),
        ("small", {"window_size": 16}, "swinv2_small_window16_256"),
        ("base", {"image_size": 192, "window_size": 12}, "swinv2_base_window12_192"),
        ("base", {}, "swinv2_base_window8_256"),
        (
            "base",
            {"window_size": 16, "pretrained_window_sizes": TWELVE},
            "swinv2_base_window12to16_192to256",
        ),
        (
            "large",
            {"image_size": 384, "window_size": 24, "pretrained_window_sizes": TWELVE},
            "swinv2_large_window12to24_192to384",
        ),
        ("large", {"image_size": 224, "window_size": 7}, "swinv2_large_window12_192"),
    ],
)
def test_model_names_are_timms(variant: str, sizes: dict[str, Any], expected: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(variant, **sizes)
    name, arguments = timm_arguments(encoder)
    assert name == expected
    assert "embed_dim" not in arguments


def bare(encoder: SwinV2, folder: Path) -> Path:
    file = folder / "bare.pth"
    torch.save(to_timm(encoder), file)
    return file


def test_sizes_follow_from_the_name(build: Build, tmp_path: Path) -> None:
    encoder = build(image_size=256, window_size=16, pretrained_window_sizes=TWELVE)
    file = bare(encoder, tmp_path)
    with pytest.raises(BridgeError, match="image_size, window_size, pretrained_window_sizes"):
        import_timm(file)
    name = "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k"
    assert import_timm(file, ImportOptions(architecture=name)).encoder.config == encoder.config
    with pytest.raises(BridgeError, match="not a swinv2 model of timm"):
        import_timm(file, ImportOptions(architecture="resnet50"))
    # A folder as on the model hub, whose name says everything.
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.move(file, hub / "pytorch_model.bin")
    content = {"architecture": name.partition(".")[0], "pretrained_cfg": {"mean": MEAN, "std": STD}}
    (hub / "config.json").write_text(json.dumps(content))
    imported = import_timm(hub)
    assert imported.encoder.config == encoder.config
    assert imported.mean == MEAN
    with pytest.raises(BridgeError, match=r"window_size is \(8, 8\) .*your arguments"):
        import_timm(hub, ImportOptions(window_size=8))


def test_arguments_in_a_folder_override_its_name(build: Build, tmp_path: Path) -> None:
    encoder = build()
    path = export_timm(encoder, tmp_path / "out", mean=MEAN, std=STD)
    content = json.loads((path / "config.json").read_text())
    assert content["architecture"] == "swinv2_tiny_window8_256"
    del content["model_args"]["window_size"]
    (path / "config.json").write_text(json.dumps(content))
    assert import_timm(path).encoder.config == encoder.config


def test_unknown_sizes_are_asked_for(build: Build, tmp_path: Path) -> None:
    encoder = build()
    file = bare(encoder, tmp_path)
    with pytest.raises(BridgeError, match="pretrained_window_sizes: give"):
        import_timm(file, ImportOptions(image_size=64, window_size=8))
    assert import_timm(file, ImportOptions(**SIZES)).encoder.config == encoder.config


def test_a_tensor_that_does_not_fit_is_named(
    build: Build, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], str]
) -> None:
    tensors = to_timm(build())
    message = spoil(tensors)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(BridgeError, match=message):
        import_timm(tmp_path / "a.pth", ImportOptions(**SIZES))


def test_a_pickle_that_runs_code_is_refused(malicious: tuple[Path, Path]) -> None:
    file, folder = malicious
    with pytest.raises(BridgeError, match=r"mkdir.*would run code"):
        import_timm(file, ImportOptions(**SIZES))
    assert not folder.exists()


def test_other_architectures_are_refused_by_name(other_model: tuple[Path, str]) -> None:
    file, reason = other_model
    with pytest.raises(BridgeError, match=reason):
        import_timm(file, ImportOptions(**SIZES))


def test_the_published_layout_names_its_format(
    build: Build, draw_heads: Callable[[SwinV2], dict[str, Any]], tmp_path: Path
) -> None:
    from swinv2.bridges.reference import import_reference

    encoder = build()
    torch.save({"model": to_reference(encoder)}, tmp_path / "reference.pth")
    with pytest.raises(BridgeError, match="import it with --format reference"):
        import_timm(tmp_path / "reference.pth", ImportOptions(**SIZES))
    masked = to_reference(encoder, head=draw_heads(encoder)["head"])
    torch.save({"model": masked}, tmp_path / "simmim.pth")
    with pytest.raises(BridgeError, match=r"has encoder\.mask_token.*--format reference"):
        import_timm(tmp_path / "simmim.pth", ImportOptions(**SIZES))
    with pytest.raises(BridgeError, match="import it with --format timm"):
        import_reference(bare(encoder, tmp_path), ImportOptions(**SIZES))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"image_size": 66}, "multiple of the patch size"),
        ({"image_size": 96, "window_size": 7}, "padding that fills"),
        ({"extra_norm_every": 2}, "norm after every 2 blocks"),
        (
            {"depths": (1, 1), "num_heads": (1, 1), "window_size": (8, 4)},
            "two stages.*square window",
        ),
    ],
)
def test_an_encoder_unsupported_by_timm_is_refused(
    build: Build, tmp_path: Path, sizes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BridgeError, match=reason):
        export_timm(build(**sizes), tmp_path / "out", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_that_does_not_fit_is_refused(build: Build) -> None:
    with pytest.raises(BridgeError, match="the classifier is"):
        to_timm(build(), classifier=draw_classifier(build(embed_dim=16)))


def test_export_needs_no_timm(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("swinv2.bridges.verification.find_spec", lambda name: None)
    assert find_timm() == (None, "timm is not installed (pip install timm)")
    path = export_timm(build(), tmp_path / "out", mean=MEAN, std=STD)
    assert "head.fc.weight" not in load_file(path / "model.safetensors")


def test_only_an_earlier_export_is_replaced(build: Build, tmp_path: Path) -> None:
    path = export_timm(build(), tmp_path / "out", mean=MEAN, std=STD)
    export_timm(build(window_size=4), path, mean=MEAN, std=STD)
    assert import_timm(path).encoder.config.window_size == (4, 4)
    (path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not replaced"):
        export_timm(build(), path, mean=MEAN, std=STD)
