"""A checkpoint in the layout of the published SimMIM: imported, measured, continued.

Its loss is computed by `tests.swinv2.bridges.published`, which no part of ours is used in.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import simmim
from simmim.cli import main
from simmim.engine.run import RunFolder
from simmim.method.masking import enlarge_mask
from simmim.recipe import load
from simmim.tasks.evaluate import evaluate_encoder
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from swinv2 import SwinV2, SwinV2Config, load_encoder, read_encoder_config, save_encoder
from swinv2.bridges.checkpoints import MaskedImageHead
from swinv2.bridges.reference import to_reference
from swinv2.method_file import read_method
from tests.swinv2.bridges.published import Published

MODEL = Published(
    depths=(1, 2), heads=(1, 2), window=4, pretrained_windows=(3, 2), norm_target=True
)
WINDOWS = ((3, 3), (2, 2))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Tensors by their published names, none of them trivial."""
    config = SwinV2Config(
        image_size=64, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4
    )
    shapes = to_reference(
        SwinV2(config),
        head=MaskedImageHead(
            mask_token=torch.zeros(16),
            weight=torch.zeros(192, 32, 1, 1),
            bias=torch.zeros(192),
        ),
    )
    return {
        name: draw(*part.shape, seed=number) * (0.5 if part.ndim == 1 else part[0].numel() ** -0.5)
        for number, (name, part) in enumerate(shapes.items())
    }


@pytest.fixture
def published(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    """A checkpoint as the published training writes it."""
    settings = {
        "DATA": {"IMG_SIZE": 64},
        "MODEL": {
            "TYPE": "swinv2",
            "SWINV2": {"WINDOW_SIZE": 4, "PRETRAINED_WINDOW_SIZES": [3, 2]},
            "SIMMIM": {"NORM_TARGET": {"ENABLE": True, "PATCH_SIZE": 47}},
        },
    }
    wrapped = {name.replace("cpb_mlp", "rpe_mlp"): part for name, part in tensors.items()}
    content = {
        "model": wrapped,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
        "max_accuracy": np.float64(0.0),
        "epoch": 799,
        "config": settings,
    }
    torch.save(content, tmp_path / "ckpt_epoch_799.pth")
    return tmp_path / "ckpt_epoch_799.pth"


@pytest.fixture
def encoder(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    directory = tmp_path / "simmim-swin"  # as a hub's model might be called
    assert main(["import", str(published), str(directory)]) == 0
    text = capsys.readouterr().out
    assert "simmim.safetensors: mask token and decoder of normalised pixels" in text
    return directory


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    """A recipe of pretraining with the published model's sizes, but its windows."""
    values = {
        "task": "pretrain",
        "encoder": {
            "variant": "tiny",
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [1, 2],
        },
        "data": {"shards": str(shards), "image_size": 64, "workers": 0, "validation_shards": 1},
        "mask": {"cell": 8},
        "loss": {"norm_target": True},
        "training": {
            "batch_size": 4,
            "steps": 4,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 4,
            "look_every": 4,
            "optimizer": {"lr": 1e-3},
        },
    }
    file = tmp_path / "continue.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def published_loss(stage: PretrainStage, batch: Any, tensors: dict[str, Tensor]) -> float:
    images = stage.module.normalise(batch.images, batch.flips)
    mask = enlarge_mask(batch.masks, stage.recipe.mask.cell // 4).long()
    return float(MODEL.loss(tensors, images, mask))


def test_the_encoder_directory_has_every_tensor(encoder: Path, tensors: dict[str, Tensor]) -> None:
    method = read_method(encoder)
    assert method is not None
    assert method.target == "normalised_pixels"
    assert torch.equal(method.mask_token.flatten(), tensors["encoder.mask_token"].flatten())
    assert torch.equal(method.weight, tensors["decoder.0.weight"])
    assert torch.equal(method.bias, tensors["decoder.0.bias"])
    ours = to_reference(load_encoder(encoder))
    assert all(torch.equal(one, tensors[f"encoder.{name}"]) for name, one in ours.items())
    assert len(ours) == len(tensors) - 3
    assert "simmim.safetensors" in (encoder / "README.md").read_text()


def test_its_loss_on_images_equals_that_of_the_published_model(
    encoder: Path,
    config: Path,
    shards: Path,
    tensors: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evaluate", str(encoder), "--config", str(config)]) == 0
    text = capsys.readouterr()
    stage = PretrainStage(load(PretrainRecipe, config))
    batches = list(stage.held_out_batches(batch_size=4))
    losses = [published_loss(stage, batch, tensors) * len(batch) for batch in batches]
    expected = sum(losses) / sum(map(len, batches))
    found = evaluate_encoder(encoder, config)
    assert found.figures["validation_loss"] == pytest.approx(expected, abs=1e-5)
    assert f"validation_loss {expected:.4f}" in text.out
    assert re.search(r"on 12 images of ", text.out)
    images = str(shards.parent / "images")
    on_folder = simmim.evaluate(encoder, config=config, data=images)
    assert on_folder.figures["validation_loss"] != expected
    assert on_folder.data == f"96 images of {images}"
    other = ["--training.batch_size", "8", "--encoder.embed_dim", "24", "--data.mean", "[0,0,0]"]
    assert evaluate_encoder(encoder, config, other).figures == pytest.approx(found.figures)
    assert "overrides the recipe: encoder.embed_dim 24 → 16" in capsys.readouterr().err


def test_the_first_loss_of_the_continued_training_equals_it(
    encoder: Path,
    config: Path,
    tensors: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunFolder(path=tmp_path / "run")
    command = ["pretrain", "--config", str(config), "--folder", str(run.path)]
    start = ["--init-from", str(encoder)]
    assert main([*command, *start]) == 0
    assert f"Starting from the encoder, mask token and decoder in {encoder}." in (
        "".join(capsys.readouterr())
    )
    stage = PretrainStage(load(PretrainRecipe, config))
    first = next(iter(stage.batches(rank=0, world=1, start=0, end=4)))
    assert first.flips is not None
    (loss,) = [line["loss"] for line in run.read_metrics() if line["step"] == 1 and "loss" in line]
    assert loss == pytest.approx(published_loss(stage, first, tensors), abs=1e-5)
    # The windows are kept: by the recipe of the run, when it resumes, and in its encoder.
    recorded = load(PretrainRecipe, run.recipe)
    assert recorded.encoder.pretrained_window_sizes == WINDOWS
    assert read_encoder_config(run.encoder).config.pretrained_window_sizes == WINDOWS
    whole = load_encoder(run.encoder).state_dict()
    (run.checkpoints / "step-00000004" / "complete").unlink()
    encoder.rename(tmp_path / "gone")
    assert main([*command, *start, "--resume", "auto"]) == 0  # as one command serves both
    again = load_encoder(run.encoder).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert read_encoder_config(run.encoder).config.pretrained_window_sizes == WINDOWS
    method = read_method(run.encoder)
    assert method is not None
    assert method.target == "normalised_pixels"


def test_what_is_absent_or_differs_is_said(
    encoder: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    save_encoder(load_encoder(encoder), bare, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    command = ["pretrain", "--config", str(config), "--training.steps", "1", "--folder"]
    assert main([*command, str(tmp_path / "run"), "--init-from", str(bare)]) == 0
    text = "".join(capsys.readouterr())
    assert f"the encoder in {bare}; mask token and decoder are initialised" in text
    assert "data.mean is [0.485, 0.456, 0.406]; to keep the features of the encoder of" in text
    assert "--init-from, set it to [0.5, 0.5, 0.5]" in text
    assert main(["evaluate", str(bare), "--config", str(config)]) == 2
    assert "has no mask token and decoder (simmim.safetensors)" in capsys.readouterr().err
    pixels = ["--loss.norm_target", "false"]
    assert main(["evaluate", str(encoder), "--config", str(config), *pixels]) == 0
    assert "was trained for normalised_pixels, and the recipe measures pixels" in (
        capsys.readouterr().err
    )
    assert main(["evaluate", str(encoder)]) == 2
    assert "--config PRETRAIN.yaml measures its reconstruction loss" in capsys.readouterr().err
    unused = ["--training.optimizer.lr", "1"]
    assert main(["evaluate", str(encoder), "--config", str(config), *unused]) == 2
    assert "--training.optimizer.lr (0.001 → 1) has no effect" in capsys.readouterr().err
    tuning = Path("jobs/finetune/cifar10.yaml").resolve()
    assert main(["evaluate", str(encoder), "--config", str(tuning)]) == 2
    assert "has task classification: --config gives" in capsys.readouterr().err
    features = ["--loss.target", "features", "--loss.target_encoder", str(bare)]
    features += ["--loss.norm_target", "false"]
    assert main([*command, str(tmp_path / "new"), "--init-from", str(encoder), *features]) == 0
    text = "".join(capsys.readouterr())
    assert "decoder.projection.weight, decoder.projection.bias are initialised, since they" in text
    assert "trained for normalised_pixels, and the recipe trains it for features" in text
    (encoder / "simmim.safetensors").write_bytes(b"cut")
    assert main([*command, str(tmp_path / "cut"), "--init-from", str(encoder)]) == 2
    assert "simmim.safetensors" in capsys.readouterr().err
