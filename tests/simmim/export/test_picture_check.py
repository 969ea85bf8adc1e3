"""Exports prepare pictures as validation does, and say where they cannot."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.cli import main
from simmim.data.order.order import Address
from simmim.data.transforms.image_transforms import EvalTransform
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.export.load_trained import read_source
from simmim.export.picture_check import _processed, compare_pictures
from simmim.recipe import parse
from simmim.tasks.classification.classifier import read_preparation, save_head
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.features import Normalise
from swinv2 import SwinV2, SwinV2Config, save_encoder
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.preprocessing import Preparation, describe, from_description, processor_config
from swinv2.bridges.transformers import export_transformers, import_transformers

SIZES = ((41, 67), (90, 33), (17, 13), (200, 201), (30, 30), (33, 90))
"""Width and height of pictures: portrait and landscape, odd, smaller than the input."""


def encoder(channels: int = 3, image_size: tuple[int, int] = (32, 32)) -> SwinV2:
    return SwinV2(
        SwinV2Config(
            image_size=image_size,
            patch_size=2,
            embed_dim=16,
            depths=(1, 2),
            num_heads=(1, 2),
            window_size=4,
            in_channels=channels,
        )
    )


def picture(size: tuple[int, int], mode: str) -> bytes:
    random = np.random.default_rng(size[0])
    small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BILINEAR).convert(mode).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class File:
    """A picture file without a label."""

    image: bytes
    extension: str = "png"
    label: int | None = None
    name: str = "picture"
    metadata: bytes | None = None


@pytest.mark.peer
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (3, "L"), (1, "L")])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9, 0.61])
def test_the_processor_of_transformers_does_what_validation_does(
    tmp_path: Path, channels: int, mode: str, crop_pct: float
) -> None:
    transformers = pytest.importorskip("transformers")
    mean, std = [0.3, 0.4, 0.5][:channels], [0.2, 0.25, 0.3][:channels]
    preparation = Preparation(crop_pct=crop_pct)
    export_transformers(
        encoder(channels), tmp_path / "out", mean=mean, std=std, preparation=preparation
    )
    transform = EvalTransform(size=(32, 32), crop_pct=crop_pct, channels=channels)
    for folder in (tmp_path / "out", tmp_path / "out" / "backbone"):
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        for size in SIZES:
            data = picture(size, mode)
            image = transform(File(data), Address(epoch=0, shard=0, sample=0)).image
            ours = Normalise(mean, std)(image[None])
            opened = Image.open(io.BytesIO(data))
            theirs = processor(images=opened, return_tensors="pt")["pixel_values"]
            assert theirs.shape == ours.shape
            apart = (ours - theirs).abs() * torch.tensor(std).view(-1, 1, 1) * 255
            assert float(apart.max()) < 2.1
            assert float(apart.mean()) < 0.1


@pytest.mark.peer
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("crop_pct", "least"), [(1.0, 1), (0.875, 2), (0.3, 4)])
def test_the_readme_says_which_pictures_a_processor_needs_prepared(
    tmp_path: Path, channels: int, crop_pct: float, least: int
) -> None:
    """Grey ones of 16 bits, which it clips, and those of which its crop is empty."""
    transformers = pytest.importorskip("transformers")
    mean, std = [0.3] * channels, [0.2] * channels
    preparation = Preparation(crop_pct=crop_pct)
    out = tmp_path / "out"
    export_transformers(encoder(channels), out, mean=mean, std=std, preparation=preparation)
    readme = " ".join((out / "README.md").read_text().split())
    assert "grey ones of 16 bits, which it would clip, with `point(lambda value: value" in readme
    assert ("crop of them is empty" in readme) == (least > 1)
    assert (f"fewer than {least} pixels" in readme) == (least > 1)
    transform = EvalTransform(size=(32, 32), crop_pct=crop_pct, channels=channels)
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    for size in ((70, 50), (least, 60), (60, least)):
        grey = np.asarray(Image.open(io.BytesIO(picture(size, "L"))), dtype=np.uint16)
        file = io.BytesIO()
        Image.fromarray(grey * 256 + 100).save(file, "PNG")
        data = file.getvalue()
        image = transform(File(data), Address(epoch=0, shard=0, sample=0)).image
        ours = Normalise(mean, std)(image[None])
        apart = (ours - _processed(processor, data, channels)).abs() * 0.2 * 255
        assert float(apart.max()) < 2.1
    if least > 1:
        thin = Image.new("RGB" if channels == 3 else "L", (60, least - 1), "white")
        black = processor(images=thin, return_tensors="pt")["pixel_values"]
        assert float((black * 0.2 + 0.3).abs().max()) < 1e-6


@pytest.fixture
def run(classification_values: dict[str, Any], tmp_path: Path) -> Path:
    classification_values["data"] |= {"crop_pct": 0.7}
    recipe = parse(ClassificationRecipe, classification_values, "test")
    stage = ClassificationStage(recipe)
    train(stage, RunFolder(path=tmp_path / "run"), build_accelerator("fp32"), None)
    return tmp_path / "run"


@pytest.mark.peer
def test_a_classifier_answers_alike_from_picture_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", "transformers"]) == 0
    said = capsys.readouterr().out
    assert "from 15 picture files" in said
    assert "the same class for 15 of 15" in said
    for place in (out, out / "image-classification"):
        content = json.loads((place / "preprocessor_config.json").read_text())
        assert content["do_center_crop"]
        side = content["crop_size"]["height"]
        assert content["size"]["height"] / side == pytest.approx(0.7)
        assert content["rescale_factor"] == 1 / 255
    assert "central 0.7 of the short side" in (out / "README.md").read_text()
    # What squashes, as an earlier export did, is refused.
    content |= {"image_processor_type": "ViTImageProcessor", "do_center_crop": False}
    (out / "preprocessor_config.json").write_text(json.dumps(content))
    found = replace(read_source(run), preparation=Preparation(crop_pct=0.7))
    with pytest.raises(BridgeError, match=r"prepares .* differently"):
        compare_pictures(found, out)


@pytest.mark.peer
def test_pictures_too_small_for_a_processor_are_not_compared(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    Image.new("RGB", (40, 1), "white").save(tmp_path / "thin.png")
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", "transformers"]) == 0
    (tmp_path / "pictures").mkdir()
    (tmp_path / "thin.png").rename(tmp_path / "pictures" / "thin.png")
    found = replace(read_source(run), shards=str(tmp_path / "pictures"))
    assert "from 12 picture files" in compare_pictures(found, out)


@pytest.mark.parametrize("form", ["timm", "reference", "torch-export", "native"])
def test_every_format_has_the_preparation(run: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", form]) == 0
    assert "the central 0.7 of the short side is cropped" in " ".join(
        (out / "README.md").read_text().split()
    )
    match form:
        case "timm":
            content = json.loads((out / "config.json").read_text())
            assert content["pretrained_cfg"]["crop_pct"] == 0.7
            assert content["pretrained_cfg"]["crop_mode"] == "center"
        case "torch-export":
            content = json.loads((out / "preprocessing.json").read_text())
        case "native":
            assert read_preparation(out / "classifier") == Preparation(crop_pct=0.7)
            assert read_preparation(run / "classifier") == Preparation(crop_pct=0.7)
            content = json.loads((out / "classifier" / "classes.json").read_text())
            # It is what the next export knows, too.
            assert read_source(out).preparation == Preparation(crop_pct=0.7)
        case _:
            content = torch.load(out / "checkpoint.pth", weights_only=True)
    crop = content["preparation"]["crop"]
    assert (crop["kind"], crop["crop_pct"], crop["order"]) == ("centre", 0.7, "before resizing")
    assert content["preparation"]["resize"]["filter"] == "bicubic"
    assert len(content["preparation"]["mean"]) == content["preparation"]["channels"] == 3


def test_heads_saved_without_the_preparation_still_load(run: Path) -> None:
    head = torch.nn.Linear(32, 3)
    save_head(head, run / "classifier", ("circle", "square", "stripe"))
    assert read_preparation(run / "classifier") is None
    assert read_source(run).preparation == Preparation(crop_pct=0.7)  # of the recipe


@pytest.mark.parametrize("largest", [255.0, 65535.0, 1.0])
def test_values_of_every_range_are_rescaled_once(tmp_path: Path, largest: float) -> None:
    preparation = Preparation(crop_pct=0.875, largest=largest)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.1] * 5
    wide = encoder(channels=5)
    export_transformers(wide, tmp_path / "out", mean=mean, std=std, preparation=preparation)
    content = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert content["do_rescale"] == (largest != 1)
    assert content["rescale_factor"] == 1 / largest
    back = import_transformers(tmp_path / "out")
    assert list(back.mean) == mean
    readme = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "1 or 3 channels only" in readme
    # As it says there.
    options = readme.partition("processor(images=image, ")[2].partition("))`")[0]
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = np.random.default_rng(0).random((32, 32, 5), dtype=np.float32) * largest
    wanted = eval(f"dict({options})")
    found = processor(images=image, **wanted)["pixel_values"]
    ours = Normalise(mean, std)(torch.from_numpy(image / largest).permute(2, 0, 1)[None])
    torch.testing.assert_close(found.float(), ours, rtol=1e-4, atol=1e-4)
    described = describe(wide.config, preparation, mean, std)
    assert from_description(json.loads(json.dumps(described))) == preparation


def test_no_processor_crops_to_a_shape_that_is_not_square() -> None:
    config = encoder(image_size=(32, 16)).config
    content = processor_config(config, Preparation(), [0.5] * 3, [0.2] * 3)
    assert content["image_processor_type"] == "ViTImageProcessor"
    assert "crop_size" not in content


@pytest.mark.peer
def test_output_of_transformers_stays_out_of_an_export(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    save_encoder(encoder(), tmp_path / "encoder", mean=(0.5,) * 3, std=(0.5,) * 3)
    arguments = ["export", str(tmp_path / "encoder"), str(tmp_path / "out")]
    assert main([*arguments, "--format", "transformers"]) == 0
    captured = capfd.readouterr()
    assert "Loading weights" not in captured.out + captured.err
    assert captured.err == ""
