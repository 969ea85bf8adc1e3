"""Looking at a module whose weights are shared out over ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[3]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(("precision", "rounding", "levels"), [("no", 1e-5, 1), ("bf16", 1e-2, 8)])
def test_sharded_ranks_record_the_same_as_whole_ones(
    pretrain_values: dict[str, Any],
    shards: Path,
    tmp_path: Path,
    precision: str,
    rounding: float,
    levels: int,
) -> None:
    """With a last batch of which one rank gets nothing."""
    pretrain_values["training"] |= {"batch_size": 4, "accumulation": 4}
    pretrain_values["probe"] = {
        "shards": str(shards),
        "samples": 31,
        "validation_samples": 7,
        "batch_size": 6,
    }
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    program = str(Path(__file__).parent / "watch_sharded.py")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, program, str(config), str(tmp_path), precision],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, sharded = json.loads(done.stdout)
    assert set(whole) == {"validation_loss", "mean_color_loss", "probe_knn_top1"}
    assert sharded == pytest.approx(whole, rel=rounding)
    one, other = (
        np.asarray(Image.open(tmp_path / name / "reconstructions/step-00000001.png"), dtype=int)
        for name in ("whole", "sharded")
    )
    assert abs(one - other).max() <= levels
