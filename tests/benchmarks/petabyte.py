"""Measure the cost of the sample order at petabyte scale: 100,000 shards, a billion samples.

    python tests/benchmarks/petabyte.py

Writes a manifest of that size (and no shards) to a temporary folder, reads it as a run does, and
times planning an epoch, the sample addresses of the first batch and of the first batch after a
resume at 90%, each with a new order. Memory is the resident set size.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from simmim.data.datasets.shards import ShardSet
from simmim.data.order.order import SampleOrder


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Cost of one operation."""

    name: str
    seconds: float
    resident: int
    """Resident set size afterwards, in bytes."""


def write_manifest(folder: Path, shards: int, samples: int) -> None:
    """Write a manifest of shards of two sizes, with `samples` samples in total."""
    sizes = np.full(shards, samples // shards)
    sizes[::2] += 7
    sizes[1::2] -= 7
    entries = [
        {
            "name": f"shard-{number:06d}.tar",
            "samples": size,
            "bytes": size * 100_000,
            "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
            "index": f"shard-{number:06d}.index.npy",
        }
        for number, size in enumerate(sizes.tolist())
    ]
    values = {
        "format": "simmim-shards",
        "version": 1,
        "samples": int(sizes.sum()),
        "rejected": 0,
        "classes": [],
        "options": {},
        "fingerprint": "",
        "shards": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(values, indent=1))


def measure(folder: Path, batch_size: int = 4096) -> list[Figure]:
    """Return the cost of each operation."""
    process, figures = psutil.Process(), []

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        figures.append(Figure(name=name, seconds=seconds, resident=process.memory_info().rss))
        return result

    shards = timed("read the manifest", lambda: ShardSet(folder))
    timed("digest", lambda: shards.digest)
    first = timed("plan an epoch", lambda: SampleOrder(shards.sizes, seed=0, slots=64))
    timed("first batch", lambda: first.batch(0, batch_size))
    middle = int(0.9 * first.samples_per_epoch) // batch_size * batch_size
    again = SampleOrder(shards.sizes, seed=0, slots=64)
    addresses = timed("resume at 90%: first batch", lambda: again.batch(middle, batch_size))
    timed("the next batch", lambda: again.batch(middle + batch_size, batch_size))
    part = timed(
        "resume at 90%: first batch of rank 3 of 64",
        lambda: SampleOrder(shards.sizes, seed=0, slots=64).batch(middle, batch_size, 3, 64),
    )
    assert part == addresses[3 * batch_size // 64 : 4 * batch_size // 64]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_manifest(Path(name), options.shards, options.samples)
        size = (Path(name) / "manifest.json").stat().st_size
        before = psutil.Process().memory_info().rss
        print(
            f"manifest of {size / 2**20:.0f} MiB; {before / 2**20:.0f} MiB resident memory before\n"
        )
        print("| | seconds | resident memory, MiB |\n|---|---|---|")
        for figure in measure(Path(name)):
            print(f"| {figure.name} | {figure.seconds:.2f} | {figure.resident / 2**20:.0f} |")


if __name__ == "__main__":
    main()
