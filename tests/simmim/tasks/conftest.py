"""Training on processes that shard the weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmim.engine.run import RunFolder

FSDP2 = Path(__file__).parents[3] / "jobs" / "accelerate" / "fsdp2.yaml"


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
