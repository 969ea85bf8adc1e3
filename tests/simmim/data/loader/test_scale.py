"""Memory in long runs and with large datasets."""

import subprocess
import sys
from pathlib import Path

import petabyte
import psutil
import pytest

from tests.simmim.data.conftest import WriteShards
from tests.simmim.data.transforms.test_decoding import jpeg, scene

EPOCHS = """
import gc, sys
import psutil, torch
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batches import TrainingBatches
from simmim.data.order.order import SampleOrder
from simmim.data.transforms.image_transforms import TrainTransform
from simmim.data.transforms.settings import RandomCropSettings

torch.set_num_threads(1)
crop = RandomCropSettings(image_size=64, scale=(0.67, 1.0))
shards = ShardSet(sys.argv[1])
order = SampleOrder(shards.sizes, seed=0, slots=8)
epoch = order.samples_per_epoch
batches = TrainingBatches(
    shards, order, TrainTransform(data=crop, seed=0), batch_size=8, start_position=0,
    end_position=20 * epoch, workers=2,
)
me, seen = psutil.Process(), 0
for batch in batches:
    seen += len(batch)
    if seen % epoch == 0:
        used = [me.memory_full_info().uss]
        used += [child.memory_full_info().uss for child in me.children()]
        print(*used, flush=True)
"""


@pytest.mark.slow
def test_memory_is_flat_over_20_epochs(write_shards: WriteShards) -> None:
    images = [jpeg(scene(180 + 7 * place, 240)) for place in range(16)] * 4
    folder = write_shards([16] * 4, images=images, extension="jpg")
    done = subprocess.run(
        [sys.executable, "-c", EPOCHS, str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    epochs = [[int(used) for used in line.split()] for line in done.stdout.splitlines()]
    settled = [used for used in epochs[4:] if len(used) == 3]  # workers end with the last batch
    assert len(epochs) == 20
    assert len(settled) >= 14
    for of_process in zip(*settled, strict=True):
        assert max(of_process) - min(of_process) < 6 * 2**20, of_process


@pytest.mark.slow
def test_a_petabyte_is_planned_in_seconds_and_bounded_memory(tmp_path: Path) -> None:
    petabyte.write_manifest(tmp_path, 100_000, 1_000_000_000)
    before = psutil.Process().memory_info().rss
    figures = petabyte.measure(tmp_path)
    for figure in figures:
        assert figure.seconds < 20, figure
        assert figure.resident - before < 600 * 2**20, figure
