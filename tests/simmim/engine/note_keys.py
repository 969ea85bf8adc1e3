"""Run `simmim` and record the address of every sample that is trained on.

    note_keys.py FILE [--stop-at STEP] pretrain …

Each rank appends to FILE.RANK one line for each micro-batch. With --stop-at, rank 0 sends itself
SIGTERM when the first batch of that step is drawn, counted from 0.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simmim.cli import main
from simmim.data.loader.batch import Batch
from simmim.engine.distributed.launcher import run_as_rank
from simmim.tasks.pretrain.stage import PretrainStage

FILE, *ARGUMENTS = sys.argv[1:]
STOP_AT = -1
if ARGUMENTS[0] == "--stop-at":
    STOP_AT, ARGUMENTS = int(ARGUMENTS[1]), ARGUMENTS[2:]

draw = PretrainStage.batches


def noted(self: PretrainStage, *, rank: int, world: int, **cursors: Any) -> Iterator[Batch]:
    training = self.recipe.training
    first = cursors["start"] // training.batch_size
    batches = draw(self, rank=rank, world=world, **cursors)
    shared = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    job = [os.environ[name] for name in shared if name in os.environ]  # the same on all ranks
    start = "-".join(job or [str(os.getpid())])
    with Path(f"{FILE}.{rank}").open("a") as file:
        for number, batch in enumerate(batches):
            step = first + number // training.accumulation
            line = {"start": start, "rank": rank, "step": step, "keys": batch.addresses.tolist()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if step == STOP_AT and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


if __name__ == "__main__":
    PretrainStage.batches = noted  # type: ignore[method-assign]
    run_as_rank(lambda: main(ARGUMENTS))  # as `python -m simmim` does
