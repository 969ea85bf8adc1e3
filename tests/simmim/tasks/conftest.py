"""A small encoder directory, and training by processes that share the weights out."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from simmim.engine.run import RunFolder
from swinv2 import SwinV2, SwinV2Config
from swinv2.weights import save_encoder

FSDP2 = Path(__file__).parents[3] / "jobs" / "accelerate" / "fsdp2.yaml"
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


@pytest.fixture
def train_in_shards(tmp_path: Path) -> Callable[[dict[str, Any], Path], list[dict[str, Any]]]:
    """Fine-tune by a recipe's values on two processes with FSDP2 in bf16; return its metrics."""

    def train(values: dict[str, Any], run: Path) -> list[dict[str, Any]]:
        config = tmp_path / "sharded.yaml"
        training = values["training"] | {"precision": "bf16"}
        config.write_text(yaml.safe_dump(values | {"training": training}))
        launch = ["simmim.launch", "--config_file", str(FSDP2), "--num_processes", "2"]
        command = ["-m", "simmim", "finetune", "--config", str(config), "--folder", str(run)]
        done = subprocess.run(
            [sys.executable, "-m", *launch, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
            start_new_session=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return list(RunFolder(path=run).read_metrics())

    return train
