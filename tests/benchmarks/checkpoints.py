"""Measure how long a checkpoint blocks training, and the time to the first batch on resume.

    OMP_NUM_THREADS=1 nice -n 15 python tests/benchmarks/checkpoints.py FOLDER

FOLDER is on the disk to measure; a few gigabytes are written there and removed again.

Stall: seconds for which `Saver.start` blocks a step, the first time (which allocates the memory)
and later; the CPU time within a later stall, which is what it takes on an idle machine; and seconds
until the checkpoint is complete, which a step would wait for without the background thread. Resume:
seconds from opening the shards to the first batch, with the cursor at 1% and at 90% of an epoch.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch

import data_prep.cli
from simmim import SimMIM
from simmim.data.datasets.procedural import draw_images
from simmim.engine.checkpoint.saver import RankContents, Saver
from simmim.engine.checkpoint.sharded_state import model_shards, optimizer_shards
from simmim.engine.optimizer import build_optimizer, parameter_groups
from simmim.engine.settings import OptimizerSettings
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from swinv2 import build_encoder


def trained(variant: str) -> tuple[SimMIM, torch.optim.Optimizer]:
    """Return a model and its optimiser after one step with zero gradients."""
    encoder = build_encoder(variant, image_size=192, window_size=12)
    model = SimMIM(encoder)
    settings = OptimizerSettings(lr=1e-3)
    groups = parameter_groups(model, settings)
    optimizer = build_optimizer(model, settings, groups)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measure_stall(variant: str, folder: Path, repeats: int) -> str:
    """Return a row of the table: size, stalls and time to completion of a checkpoint."""
    model, optimizer = trained(variant)
    contents = RankContents(
        shard=0,
        shard_count=1,
        model=model_shards(model, 0),
        optimizer=optimizer_shards(optimizer, 0),
        texts={"state.json": "{}"},
    )
    shards = [*contents.model.values(), *contents.optimizer.values()]
    size = sum(shard.rows.numel() * shard.rows.element_size() for shard in shards)
    saver = Saver(folder, keep_last=1)
    stalls, works, totals = [], [], []
    for step in range(repeats + 1):
        began, worked = time.perf_counter(), time.thread_time()
        saver.start(step, contents)
        stalls.append(time.perf_counter() - began)
        works.append(time.thread_time() - worked)
        outcome = saver.finish(list)
        totals.append(time.perf_counter() - began)
        assert outcome is not None
        assert outcome.saved, outcome.reason
    saver.close()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"| {variant} | {parameters / 1e6:.0f} M | {size / 1e9:.2f} GB | {stalls[0]:.3f} | "
        f"{median(stalls[1:]):.3f} | {median(works[1:]):.3f} | {median(totals[1:]):.3f} |"
    )


def measure_resume(folder: Path, images: int, repeats: int) -> Iterable[str]:
    """Yield rows of the table: seconds to the first batch at two positions in an epoch."""
    draw_images(folder / "images", count=images, size=32, seed=0)
    data_prep.cli.main(["shard", str(folder / "images"), str(folder / "shards")])
    values = {
        "task": "pretrain",
        "encoder": {"variant": "tiny", "patch_size": 2, "window_size": 4},
        "data": {"shards": str(folder / "shards"), "image_size": 32, "workers": 2},
        "mask": {"cell": 8},
        "training": {"batch_size": 64, "epochs": 1, "optimizer": {"lr": 1e-3}},
    }
    recipe = parse(PretrainRecipe, values, "benchmark")
    for share in (0.01, 0.9):
        seconds = []
        for _ in range(repeats):
            stage = PretrainStage(recipe)
            epoch = stage.order.samples_per_epoch
            cursor = int(share * epoch) // 64 * 64
            began = time.perf_counter()
            batches = iter(stage.batches(rank=0, world=1, start=cursor, end=cursor + 640))
            next(batches)
            seconds.append(time.perf_counter() - began)
            del batches
        yield f"| {share:.0%} of an epoch of {epoch} | {median(seconds):.3f} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="on the disk to measure")
    parser.add_argument("--variants", nargs="+", default=["tiny", "base"])
    parser.add_argument("--images", type=int, default=20_000, help="images of the resume test")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        print("| | parameters | written | first stall | later stalls | CPU | until complete |")
        print("|---|---|---|---|---|---|---|")
        for variant in arguments.variants:
            print(measure_stall(variant, Path(work, variant), arguments.repeats), flush=True)
        print("\n| resumed at | first batch, s |\n|---|---|")
        for line in measure_resume(Path(work), arguments.images, arguments.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
