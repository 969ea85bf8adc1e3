"""Training on processes that shard the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import data_prep.cli
from simmim.engine.run import RunFolder
from tests.simmim.forked import FSDP2, finish
from tests.simmim.tasks.channel_sets import MakeSet, scene


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


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Return a function that writes labelled arrays as shards: names, given or not → folder."""

    def make(names: tuple[str, ...], *, named: bool = True, folder: str = "") -> str:
        folder = folder or f"{'_'.join(names)}{named}"
        for number in range(16):
            path = tmp_path / folder / "images" / "ab"[number % 2] / f"{number:02}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, scene(number, names))
        place = tmp_path / folder / "shards"
        arguments = ["shard", str(tmp_path / folder / "images"), str(place)]
        arguments += ["--samples-per-shard", "4", "--workers", "1"]
        if named:
            arguments += ["--channels", ",".join(names)]
        assert data_prep.cli.main(arguments) == 0
        return str(place)

    return make
