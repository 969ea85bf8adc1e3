"""Looking at a module whose weights are shared out over ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.simmim.forked import finish


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
    text = finish([program, str(config), str(tmp_path), precision], tmp_path / "log", ranks=2)
    (line,) = [line for line in text.splitlines() if line.startswith("[{")]
    whole, sharded = json.loads(line)
    assert set(whole) == {"validation_loss", "mean_color_loss", "probe_knn_top1"}
    assert sharded == pytest.approx(whole, rel=rounding)
    one, other = (
        np.asarray(Image.open(tmp_path / name / "reconstructions/step-00000001.png"), dtype=int)
        for name in ("whole", "sharded")
    )
    assert abs(one - other).max() <= levels
