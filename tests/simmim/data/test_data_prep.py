"""From images in folders through data-prep to batches: the two packages agree on the format."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep.cli
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batches import TrainingBatches, evaluation_batches
from simmim.data.order.order import SampleOrder
from simmim.data.transforms.image_transforms import EvalTransform, TrainTransform
from tests.simmim.data.conftest import crop

CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of 60 grey images, each shade once; the class is the shade modulo 3."""
    for shade in range(60):
        path = tmp_path / "images" / CLASSES[shade % 3] / f"{shade}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 14), 4 * shade, dtype=np.uint8)).save(path)
    destination = tmp_path / "shards"
    assert data_prep.cli.main(["shard", str(tmp_path / "images"), str(destination)]) == 0
    return destination


def test_every_image_comes_back_with_its_class(folder: Path) -> None:
    shards = ShardSet(folder)
    assert shards.classes == CLASSES
    assert len(shards) == 60
    seen = {}
    for batch in evaluation_batches(shards, EvalTransform(size=(8, 8)), batch_size=7, workers=1):
        assert batch.labels is not None
        shades = batch.images[:, 0, 4, 4].tolist()
        seen |= dict(zip(shades, batch.labels.tolist(), strict=True))
    assert seen == {4 * shade: shade % 3 for shade in range(60)}


def test_an_epoch_of_training_shows_each_image_once(folder: Path) -> None:
    training, validation = ShardSet(folder).split(1)
    assert 0 < validation.samples < 60
    order = SampleOrder(training.sizes, seed=0, slots=4)
    batches = TrainingBatches(
        training,
        order,
        TrainTransform(data=crop(8), seed=0),
        batch_size=4,
        start_position=0,
        end_position=order.samples_per_epoch,
        workers=1,
    )
    shades = [shade for batch in batches for shade in batch.images[:, 0, 4, 4].tolist()]
    assert len(shades) == len(set(shades)) == order.samples_per_epoch
