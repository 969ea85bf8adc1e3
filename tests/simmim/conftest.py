"""Shards and recipes small enough that a training takes a second or two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import data_prep.cli
from simmim.environment import process_environment
from swinv2 import SwinV2, SwinV2Config
from swinv2.weights import save_encoder

CLASSES = ("circle", "square", "stripe")


def draw(folder: Path, count: int) -> None:
    """Write `count` images of 24x20 pixels in three classes, a folder each."""
    random = np.random.default_rng(0)
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        pixels = random.integers(0, 60, (20, 24, 3), dtype=np.uint8)
        rows, columns = np.mgrid[:20, :24]
        match name:
            case "circle":
                inside = (rows - 10) ** 2 + (columns - 12) ** 2 < 49
            case "square":
                inside = (abs(rows - 10) < 6) & (abs(columns - 12) < 6)
            case _:
                inside = (rows // 3) % 2 == 0
        pixels[inside] += random.integers(100, 190, 3, dtype=np.uint8)
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number:04d}.png")


@pytest.fixture(autouse=True)
def fresh_environment() -> Iterator[None]:
    """Let each test set environment variables: they are read once in a process."""
    process_environment.cache_clear()
    yield
    process_environment.cache_clear()


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """Let each test choose its precision: accelerate keeps the first for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight shards of twelve labelled images."""
    folder = tmp_path_factory.mktemp("data")
    draw(folder / "images", 96)
    code = data_prep.cli.main(
        ["shard", str(folder / "images"), str(folder / "shards"), "--samples-per-shard", "12"]
    )
    assert code == 0
    return folder / "shards"


@pytest.fixture
def pretrain_values(shards: Path) -> dict[str, Any]:
    """The values of a pretraining recipe of a second."""
    return {
        "task": "pretrain",
        "encoder": {
            "variant": "tiny",
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "drop_path": 0.2,
        },
        "data": {"shards": str(shards), "image_size": 16, "workers": 0},
        "mask": {"cell": 4},
        "training": {
            "batch_size": 8,
            "steps": 12,
            "log_every": 2,
            "checkpoint_every": 4,
            "validate_every": 6,
            "look_every": 12,
            "optimizer": {"lr": 1e-3},
        },
    }


@pytest.fixture
def pretrain_config(pretrain_values: dict[str, Any], tmp_path: Path) -> Path:
    """That recipe as a file."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(pretrain_values))
    return path


@pytest.fixture
def classification_values(shards: Path) -> dict[str, Any]:
    """The values of a fine-tuning recipe from scratch."""
    return {
        "task": "classification",
        "encoder": {
            "variant": "tiny",
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "drop_path": 0.1,
        },
        "data": {
            "shards": str(shards),
            "image_size": 16,
            "workers": 0,
            "slots": 4,
            "validation_shards": 2,
            "scale": [0.6, 1.0],
        },
        "training": {
            "batch_size": 8,
            "steps": 8,
            "log_every": 2,
            "checkpoint_every": 4,
            "validate_every": 8,
            "optimizer": {"lr": 2e-3, "layer_decay": 0.8},
        },
    }


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def small_encoder(seed: int = 3) -> SwinV2:
    """An encoder with no trivial weight: in fresh ones every block is the identity."""
    config = SwinV2Config(
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=(1, 2),
        num_heads=(1, 2),
        window_size=4,
    )
    encoder = SwinV2(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder


@pytest.fixture
def encoder_directory(tmp_path: Path) -> Path:
    """An encoder directory as a pretraining run leaves it."""
    return save_encoder(small_encoder(), tmp_path / "encoder", mean=MEAN, std=STD)
