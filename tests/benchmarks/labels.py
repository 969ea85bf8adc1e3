"""Label efficiency of SimMIM pretraining on CIFAR-10: 1 %, 10 % and all labels, in one command.

    OMP_NUM_THREADS=1 python tests/benchmarks/labels.py --data cifar10.zip --folder runs/labels

Writes shards, pretrains on the 50,000 training images with two processes, fine-tunes from
pretrained and from random weights for each fraction of the labels and each seed, and writes a page
with table and plot: `FOLDER/labels/labels.html`, with `labels.svg` and `labels.json`. Then repeats
1 % with the augmentation that suits so few images, into `FOLDER/few-labels`. Finished runs are not
repeated, and interrupted ones are resumed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from simmim.report.labels_page import LabelScores, gain_from_pretraining

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data/cifar10.zip"
PRETRAINING = ROOT / "jobs/pretrain/cifar10-hour.yaml"
STUDIES = {"labels": (0.01, 0.1, 1.0), "few-labels": (0.01,)}
"""Fractions of the labels per study: recipe jobs/finetune/cifar10-STUDY.yaml, folder STUDY."""
EXPECTED = {("few-labels", 0.01): 10.0, ("labels", 0.1): 8.0, ("labels", 1.0): 3.0}
"""Minimum gain from pretraining, in points, by study and fraction."""


def main() -> int:
    """Run everything; return 1 if pretraining gains less than expected, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=DATA, help="cifar10.zip")
    parser.add_argument("--folder", type=Path, default=Path("runs/labels"), help="output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    began = time.monotonic()
    shards = {part: make_shards(arguments.data, folder, part) for part in ("train", "test")}
    pretrained = folder / "pretrained"
    if not (pretrained / "encoder").is_dir():
        run(
            *("-m", "simmim.launch", "torchrun", "--standalone", "--nproc_per_node", "2"),
            *("-m", "simmim", "pretrain", "--config", str(PRETRAINING)),
            *("--folder", str(pretrained), "--resume", "auto"),
            *("--data.shards", str(shards["train"])),
            threads=1,
        )
    say(f"pretraining: {(time.monotonic() - began) / 60:.1f} min elapsed")
    for study, shares in STUDIES.items():
        run(
            *("-m", "simmim", "labels"),
            *("--config", str(ROOT / f"jobs/finetune/cifar10-{study}.yaml")),
            *("--init", str(pretrained / "encoder"), "--folder", str(folder / study)),
            *("--seeds", *map(str, arguments.seeds), "--fractions", *map(str, shares)),
            *("--data.shards", str(shards["train"]), "--data.validation", str(shards["test"])),
            threads=os.cpu_count() or 1,
        )
    say(f"total: {(time.monotonic() - began) / 60:.1f} min elapsed")
    reached = [
        check_gain(folder / study, share, points) for (study, share), points in EXPECTED.items()
    ]
    return int(not all(reached))


def check_gain(folder: Path, share: float, expected: float) -> bool:
    """Print the gain from pretraining at a fraction of the labels; return whether it suffices."""
    found = json.loads((folder / "labels.json").read_text())
    scores = [LabelScores(**(one | {"values": tuple(one["values"])})) for one in found]
    points = gain_from_pretraining(scores, share)
    say(f"{folder.name}, {100 * share:g} %: {points:+.1f} points (expected: {expected:g})")
    return points >= expected


def make_shards(data: Path, folder: Path, part: str) -> Path:
    """Write the shards of `train` or `test` unless they exist, and return their folder."""
    shards = folder / f"shards-{part}"
    if not (shards / "manifest.json").is_file():
        run("-m", "data_prep", "shard", str(data), str(shards), "--include", f"{part}/*", threads=1)
    return shards


def run(*arguments: str, threads: int) -> None:
    """Run Python with the arguments.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *arguments], check=True, env=environment)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
