"""What SimMIM pretraining gains on CIFAR-10 with 1 %, 10 % and all of the labels, in one command.

    OMP_NUM_THREADS=1 python tests/benchmarks/labels.py --data cifar10.zip --folder runs/labels

Shards, pretraining on the 50,000 training images on two processes, fine-tuning from both starts for
each share and seed, and a page with table and plot: `FOLDER/labels/labels.html`, and `labels.svg`
and `labels.json` beside it. Then 1 % again, with the augmentation that so few images want, into
`FOLDER/few-labels`. What has ended is not repeated, and what was stopped goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from simmim.report.labels_page import LabelScores, gained

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data/cifar10.zip"
PRETRAINING = ROOT / "jobs/pretrain/cifar10-hour.yaml"
STUDIES = {"labels": (0.01, 0.1, 1.0), "few-labels": (0.01,)}
"""Shares of the labels, by the recipe in jobs/finetune, after `cifar10-`, and folder."""
EXPECTED = {("few-labels", 0.01): 10.0, ("labels", 0.1): 8.0, ("labels", 1.0): 3.0}
"""Points that pretraining is to gain."""


def main() -> int:
    """Run all of it; exit code 1 where pretraining gains less than it is to."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=DATA, help="cifar10.zip")
    parser.add_argument("--folder", type=Path, default=Path("runs/labels"), help="of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    began = time.monotonic()
    shards = {part: make_shards(arguments.data, folder, part) for part in ("train", "test")}
    pretrained = folder / "pretrained"
    if not (pretrained / "encoder").is_dir():
        run(
            *("-m", "simmim.engine.distributed.torchrun", "--standalone", "--nproc_per_node", "2"),
            *("-m", "simmim", "pretrain", "--config", str(PRETRAINING)),
            *("--folder", str(pretrained), "--resume", "auto"),
            *("--data.shards", str(shards["train"])),
            threads=1,
        )
    say(f"pretraining: {(time.monotonic() - began) / 60:.1f} min since the start")
    for study, shares in STUDIES.items():
        run(
            *("-m", "simmim", "labels"),
            *("--config", str(ROOT / f"jobs/finetune/cifar10-{study}.yaml")),
            *("--init", str(pretrained / "encoder"), "--folder", str(folder / study)),
            *("--seeds", *map(str, arguments.seeds), "--fractions", *map(str, shares)),
            *("--data.shards", str(shards["train"]), "--data.validation", str(shards["test"])),
            threads=os.cpu_count() or 1,
        )
    say(f"all: {(time.monotonic() - began) / 60:.1f} min since the start")
    reached = [told(folder / study, share, points) for (study, share), points in EXPECTED.items()]
    return int(not all(reached))


def told(folder: Path, share: float, expected: float) -> bool:
    """Print what pretraining gains with a share of the labels; return whether it is enough."""
    found = json.loads((folder / "labels.json").read_text())
    scores = [LabelScores(**(one | {"values": tuple(one["values"])})) for one in found]
    points = gained(scores, share)
    say(f"{folder.name}, {100 * share:g} %: {points:+.1f} points, {expected:g} are expected")
    return points >= expected


def make_shards(data: Path, folder: Path, part: str) -> Path:
    """Return the shards of `train` or `test`."""
    shards = folder / f"shards-{part}"
    if not (shards / "manifest.json").is_file():
        run("-m", "data_prep", "shard", str(data), str(shards), "--include", f"{part}/*", threads=1)
    return shards


def run(*arguments: str, threads: int) -> None:
    """Run Python; where it fails, this ends."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *arguments], check=True, env=environment)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
