"""Images, shards and a recipe small enough to train in seconds."""

from pathlib import Path

import pytest
import yaml

import data_prep.cli
from simmim.data.datasets.procedural import draw_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of procedurally drawn images in classes."""
    folder = tmp_path_factory.mktemp("data") / "images"
    draw_images(folder, count=64, size=24, seed=0)
    return folder


@pytest.fixture(scope="session")
def recipe(images: Path) -> Path:
    """A pretraining recipe that runs in about a second, next to its shards."""
    shards = images.parent / "shards"
    assert data_prep.cli.main(["shard", str(images), str(shards), "--samples-per-shard", "8"]) == 0
    sizes = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}
    values = {
        "task": "pretrain",
        "encoder": {"variant": "tiny", "patch_size": 2, "window_size": 4, **sizes},
        "data": {"shards": str(shards), "image_size": 16, "workers": 0, "slots": 4},
        "mask": {"cell": 4},
        "training": {
            "batch_size": 8,
            "steps": 4,
            "log_every": 1,
            "checkpoint_every": 4,
            "validate_every": 4,
            "look_every": 4,
            "optimizer": {"lr": 1e-3},
        },
    }
    path = images.parent / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
