"""Measure images per second of whole trainings: ours and two peers', in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/train.py photos.zip jobs/pretrain/tiny-800ep.yaml
    python tests/benchmarks/train.py cifar10.zip jobs/pretrain/cifar10-hour.yaml --batch 128

Whole means from image files to updated weights: reading, decoding, augmentation, masks, targets,
forward and backward pass, clipping, AdamW. Ours is `simmim pretrain` with the recipe, on shards of
the images; peers train on the same images in a folder, with the recipe's sizes and settings:
transformers' Trainer with the model and the preparation of its masked-image script, and a plain
loop on timm's encoder. Each has the target it comes with: ours that of the recipe, normalised
pixels in most; peers plain pixels, which cost them nothing.

Each contestant trains in its own process (train_contestants.py), bound to the same cores, with one
data worker; it pauses while the others have their turn, and after a pause goes on for as many
unmeasured steps as batches were prepared in it. On one core the processor time of training and
data worker is measured, which depends less on other load than wall time.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from step import processor

import data_prep.cli

CONTESTANTS = Path(__file__).with_name("train_contestants.py")
NAMES = ("transformers", "timm", "ours")
WARM_UP = 2
"""First turns, which are not counted: they fill caches, and start data workers."""
SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(kw_only=True)
class Contestant:
    """A training in its own process, and the images per second of its turns."""

    name: str
    process: "subprocess.Popen[str]"
    rates: list[float] = field(default_factory=list)

    def read(self) -> object:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or "null")

    def take_turn(self, images: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        seconds = self.read()
        if not isinstance(seconds, float):
            raise SystemExit(f"{self.name} failed; see the output above")
        self.rates.append(images / seconds)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", type=Path, help="ZIP of JPEG or PNG images")
    parser.add_argument("recipe", type=Path, help="recipe of a pretraining")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--limit", type=int, default=2000, help="number of images")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {processor()}")
    with tempfile.TemporaryDirectory() as folder:
        unpack(options.images, Path(folder) / "images", options.limit)
        command = ["shard", f"{folder}/images", f"{folder}/shards", "--workers", "1"]
        if data_prep.cli.main(command):
            raise SystemExit("data-prep failed; see the output above")
        for precision in options.precisions:
            title = f"{options.recipe.stem} {precision}, {options.cores} cores"
            print(f"\n{title}, batches of {options.batch}", flush=True)
            compare(options, precision, Path(folder))


def unpack(archive: Path, folder: Path, limit: int) -> None:
    """Extract images spread over an archive, named by their number."""
    folder.mkdir()
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if Path(name).suffix.lower() in SUFFIXES]
        for number, name in enumerate(names[:: max(1, len(names) // limit)][:limit]):
            target = folder / f"{number:06d}{Path(name).suffix.lower()}"
            with file.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def compare(options: argparse.Namespace, precision: str, folder: Path) -> None:
    contestants = [start(name, options, precision, folder) for name in NAMES]
    for one in contestants:
        if one.read() != "ready":
            raise SystemExit(f"{one.name} failed to start; see the output above")
    for _ in range(WARM_UP + options.repeats):
        for one in contestants:
            one.take_turn(options.batch * options.steps)
    for one in contestants:
        del one.rates[:WARM_UP]
    for one in contestants:
        one.process.kill()
        one.process.communicate()
    *peers, _ = contestants
    best = max(peers, key=lambda one: one.rate)
    for one in contestants:
        ratios = [own / other for own, other in zip(one.rates, best.rates, strict=True)]
        print(
            f"  {one.name:14} {one.rate:8.2f} images/s ({min(one.rates):.2f} to "
            f"{max(one.rates):.2f})  x{one.rate / best.rate:.2f} of the best peer "
            f"(x{min(ratios):.2f} to x{max(ratios):.2f} in single turns)",
            flush=True,
        )


def start(name: str, options: argparse.Namespace, precision: str, folder: Path) -> Contestant:
    command = [sys.executable, str(CONTESTANTS), name, str(options.recipe), str(folder)]
    command += ["--precision", precision, "--batch", str(options.batch)]
    command += ["--steps", str(options.steps), "--cores", str(options.cores)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.cores)},
    )
    return Contestant(name=name, process=process)


if __name__ == "__main__":
    main()
