"""Every sample once per epoch, through real loaders in separate processes.

Run as a script, `test_every_key.py RECIPE WORLD FOLDER`, this file is all ranks of a run: each
writes the names of the samples in its batches into FOLDER.
"""

import json
import multiprocessing
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import data_prep.cli
import simmim.cli
from simmim.recipe import load
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from tests.simmim.forked import finish

EPOCHS = 3


def load_as_rank(recipe: Path, rank: int, world: int, folder: Path) -> None:
    stage = PretrainStage(load(PretrainRecipe, recipe))
    training = stage.recipe.training
    end = training.total_steps(stage.order.samples_per_epoch) * training.batch_size
    with (folder / f"{world}-{rank}.jsonl").open("w") as file:
        for batch in stage.batches(rank=rank, world=world, start=0, end=end):
            found = [
                (epoch, stage.training_shards.name(shard, sample))
                for epoch, shard, sample in batch.addresses.tolist()
            ]
            file.write(json.dumps(found) + "\n")


def load_in_processes(recipe: Path, world: int, folder: Path) -> list[list[tuple[int, str]]]:
    """Return the global batches: each the parts of all ranks, end to end."""
    finish([__file__, str(recipe), str(world), str(folder)], folder / "log")
    parts = [
        [json.loads(line) for line in (folder / f"{world}-{rank}.jsonl").read_text().splitlines()]
        for rank in range(world)
    ]
    return [
        [(epoch, name) for part in step for epoch, name in part]
        for step in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="session")
def images(shards: Path) -> Path:
    """The folder of images that the shards were made of."""
    return shards.parent / "images"


@pytest.mark.skipif(sys.platform != "linux", reason="starts ranks by fork")
@pytest.mark.parametrize(
    ("samples_per_shard", "workers", "slots", "batch_size"),
    [(60, 3, 8, 16), (60, 3, None, 20), (5, 1, None, 16)],
)
def test_every_key_once_per_epoch_on_any_number_of_ranks(
    images: Path,
    pretrain_values: dict[str, Any],
    tmp_path: Path,
    samples_per_shard: int,
    workers: int,
    slots: int | None,
    batch_size: int,
) -> None:
    command = ["shard", str(images), str(tmp_path / "set"), "--samples-per-shard"]
    assert data_prep.cli.main([*command, str(samples_per_shard)]) == 0
    pretrain_values["data"] |= {
        "shards": str(tmp_path / "set"),
        "validation_shards": 0,
        "workers": workers,  # more than there are shards, of the large ones
        "slots": slots,
    }
    pretrain_values["training"] |= {"batch_size": batch_size, "steps": None, "epochs": EPOCHS}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(pretrain_values))
    whole = load_in_processes(recipe, 1, tmp_path)
    for world in (2, 4):
        assert load_in_processes(recipe, world, tmp_path) == whole
    samples = PretrainStage(load(PretrainRecipe, recipe)).training_shards.samples
    for epoch in range(EPOCHS):
        seen = Counter(name for step in whole for number, name in step if number == epoch)
        assert set(seen.values()) == {1}
        assert samples - batch_size < len(seen) <= samples
        if slots is None and epoch < EPOCHS - 1:  # the last one ends with a whole batch
            assert len(seen) == samples


@pytest.mark.parametrize("workers", [0, 3])
def test_too_few_samples_for_the_slots_are_refused_with_the_number(
    pretrain_config: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--data.slots", "96", "--training.batch_size", "96", "--data.workers", str(workers)]
    command = ["pretrain", "--config", str(pretrain_config), "--folder", str(tmp_path / "run")]
    assert simmim.cli.main([*command, *few]) == 2
    message = capsys.readouterr().err
    assert "samples cannot fill 96 slots" in message


if __name__ == "__main__":
    recipe, world, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=load_as_rank, args=(recipe, rank, world, folder))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=150)
    sys.exit(any(process.exitcode != 0 for process in ranks))
