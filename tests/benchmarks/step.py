"""Measure time and memory of a SimMIM step with our encoder, timm's and transformers', in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py --variants tiny base --threads 1 2
    python tests/benchmarks/step.py --device cuda --variants tiny base large --precisions bf16 \
        --batch 128 --modes eager compiled

Each contestant runs in its own process (contestants.py); repeats are interleaved, so that all see
the same other load, and medians are compared. The limit is the rate of torch.mm, measured in
between, divided by the operations of transformers' step; it does not depend on work that a
contestant adds or leaves out. Peers are compiled as our encoder is, block by block.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from swinv2 import build_encoder
from swinv2.bridges.transformers_layout import transformers_config

CONTESTANTS = Path(__file__).with_name("contestants.py")


@dataclass(kw_only=True)
class Contestant:
    """A contestant's process and its measurements."""

    name: str
    process: "subprocess.Popen[str]"
    seconds: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    peak: float = 0.0

    def ask(self, question: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["tiny", "base"])
    parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--peers", nargs="*", default=["timm", "transformers"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ours", nargs="+", default=["ours"], choices=["ours", "checkpointed"])
    parser.add_argument("--size", type=int, default=192, help="pixels")
    parser.add_argument("--window", type=int, default=12, help="tokens")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    place = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {place}")
    for variant in options.variants:
        operations = operations_of_peer(variant, options.size, options.window, options.batch)
        for threads in options.threads:
            unit = "thread" if threads == 1 else "threads"
            for precision in options.precisions:
                for mode in options.modes:
                    title = f"{variant} {precision}, {threads} {unit}, {mode}"
                    print(f"\n{title}: {operations / 1e9:.1f} GFLOP per image", flush=True)
                    compare(options, variant, precision, threads, mode, operations)


def compare(
    options: argparse.Namespace,
    variant: str,
    precision: str,
    threads: int,
    mode: str,
    operations: float,
) -> None:
    contestants = [
        start(name, options, variant, precision, threads, mode)
        for name in [*options.peers, *options.ours]
    ]
    for _ in range(options.repeats):
        for contestant in contestants:
            contestant.products.append(contestant.ask("products"))
            contestant.seconds.append(contestant.ask("step"))
    for contestant in contestants:
        contestant.peak = contestant.ask("peak")
        contestant.process.communicate()
    limit = statistics.median(rate for one in contestants for rate in one.products)
    best = max(
        options.batch / statistics.median(one.seconds) for one in contestants[: len(options.peers)]
    )
    print(f"  torch.mm: {limit / 1e9:.0f} GFLOP/s")
    for one in contestants:
        speed = options.batch / statistics.median(one.seconds)
        print(
            f"  {one.name:14} {speed:7.2f} images/s  x{speed / best:.2f} of the best peer  "
            f"{speed * operations / limit:4.0%} of the limit  peak {one.peak / 2**20:6.0f} MiB",
            flush=True,
        )


def start(
    name: str, options: argparse.Namespace, variant: str, precision: str, threads: int, mode: str
) -> Contestant:
    sizes = ["--size", str(options.size), "--window", str(options.window)]
    settings = ["--batch", str(options.batch), "--precision", precision, "--threads", str(threads)]
    command = [sys.executable, str(CONTESTANTS), name, "--variant", variant, *sizes, *settings]
    command += ["--device", options.device]
    process = subprocess.Popen(
        command + (["--compile"] if mode == "compiled" else []),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert process.stdout is not None
    if json.loads(process.stdout.readline() or "null") != "ready":
        raise SystemExit(f"{name} failed to build; see the output above")
    return Contestant(name=name, process=process)


def operations_of_peer(variant: str, size: int, window: int, batch: int) -> float:
    """Return the operations per image of transformers' step, forward and backward."""
    import transformers

    encoder = build_encoder(variant, image_size=size, window_size=window)
    config = transformers.Swinv2Config(**transformers_config(encoder))
    with torch.device("meta"):
        model = transformers.Swinv2ForMaskedImageModeling(config)
        images = torch.randn(batch, 3, size, size)
        hidden = torch.zeros(batch, (size // 4) ** 2, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            model(images, bool_masked_pos=hidden).loss.backward()
    return counter.get_total_flops() / batch


def processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
