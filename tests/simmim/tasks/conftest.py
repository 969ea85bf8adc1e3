"""Training on processes that shard the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmim.engine.run import RunFolder
from tests.simmim.forked import FSDP2, finish


@pytest.fixture
def train_in_shards(tmp_path: Path) -> Callable[[dict[str, Any], Path], list[dict[str, Any]]]:
    """Fine-tune by a recipe's values on two processes with FSDP2 in bf16; return its metrics."""

    def train(values: dict[str, Any], run: Path) -> list[dict[str, Any]]:
        config = tmp_path / "sharded.yaml"
        training = values["training"] | {"precision": "bf16"}
        config.write_text(yaml.safe_dump(values | {"training": training}))
        command = ["-m", "simmim", "finetune", "--config", str(config), "--folder", str(run)]
        finish(command, tmp_path / "log", ranks=2, environment=FSDP2)
        return list(RunFolder(path=run).read_metrics())

    return train
