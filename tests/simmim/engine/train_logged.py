"""A training whose ranks write the samples of each step: train_logged.py PREFIX simmim ARGUMENTS.

Each rank appends a line per micro-batch to PREFIX-RANK: epoch and name of each sample.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import simmim.cli
from simmim.data.loader.batch import Batch
from simmim.engine.trainer import Trainer

if __name__ == "__main__":
    prefix, _, *arguments = sys.argv[1:]
    log = Path(f"{prefix}-{os.environ['RANK']}").open("a")  # noqa: SIM115
    take = Trainer.next_batch

    def take_and_write(trainer: Trainer, batches: Iterator[Batch]) -> list[Batch]:
        taken = take(trainer, batches)
        shards = trainer.stage.training_shards
        for batch in taken:
            places = batch.addresses.tolist()
            names = [(epoch, shards.name(shard, sample)) for epoch, shard, sample in places]
            log.write(json.dumps(names) + "\n")
            log.flush()
        return taken

    Trainer.next_batch = take_and_write  # type: ignore[method-assign]
    sys.exit(simmim.cli.main(arguments))
