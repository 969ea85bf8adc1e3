"""Forward and backward pass of SimMIM with our encoder or a peer's, as its users would write it.

`step.py` runs it as a subprocess: it prints "ready", then answers each line on standard input with
a line of JSON. "step" runs a step and returns seconds, "products" multiplies matrices and returns
operations per second; "peak" returns the memory in bytes that a step adds to what the process, or
the GPU, used before the model was built, with all libraries imported.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stand_in import import_with_stand_in

from simmim.bench.gpu import peers
from simmim.engine.devices import keep_freed_memory
from swinv2 import variant_config

SIDES = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices that measure the limit."""
PRODUCTS = 16
"""Matrix products per measurement: about the operations of a step of a few images."""
WARM_UP = {"cpu": 1, "cuda": 5}
"""Untimed first steps: they compile, choose kernels and fill caches."""

SMALL = {"variant": "tiny", "size": 64, "window": 4, "batch": 1, "compile": False}
"""Options of the first step, before which no memory is measured: it imports what steps need."""

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("contestant", choices=["ours", "checkpointed", "timm", "transformers"])
    parser.add_argument("--variant", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", choices=["f32", "bf16"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if options.contestant == "timm":
        import_with_stand_in("timm")
    build(argparse.Namespace(**vars(options) | SMALL))()  # imports what a step needs
    baseline = 0.0 if on_gpu else memory("VmRSS")
    step = build(options)
    with torch.random.fork_rng():
        for _ in range(WARM_UP[options.device]):
            step()
    keep_freed_memory()  # as training does; the same for all contestants
    products = matrix_products(options.precision, options.device)
    operations = PRODUCTS * 2 * SIDES[options.device] ** 3
    # CPU time on one thread: less sensitive to other load than wall time.
    clock = time.process_time if options.threads == 1 and not on_gpu else time.perf_counter
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        match line.strip():
            case "step" if on_gpu:
                step()  # allocates the memory
                answer = timed(step, clock)
                torch.cuda.empty_cache()  # the other contestants need it
            case "step":
                answer = timed(step, clock)
            case "products":
                answer = operations / timed(products, clock)
            case _ if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                step()
                answer = float(torch.cuda.max_memory_allocated())
            case _:
                Path("/proc/self/clear_refs").write_text("5")  # reset the peak
                step()
                answer = memory("VmHWM") - baseline
        print(json.dumps(answer), flush=True)


def build(options: argparse.Namespace) -> Step:
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    checkpointed = options.contestant == "checkpointed"
    name = "ours" if checkpointed else options.contestant
    config = variant_config(options.variant, image_size=options.size, window_size=options.window)
    contestant = peers.build(name, config)
    model: Any = contestant.model
    if checkpointed:
        model.encoder.set_execution(checkpointing="full")
    if options.compile:
        contestant.compile("inductor")
    cells = options.size // peers.MASK_CELL
    images = torch.randn(options.batch, 3, options.size, options.size)
    hidden = (torch.arange(cells**2) < round(0.6 * cells**2)).view(cells, cells)
    mask = hidden.expand(options.batch, cells, cells)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")

    def step() -> None:
        model.zero_grad()
        with autocast:
            value = contestant.compute_loss(images, mask)
        value.backward()

    return step


def matrix_products(precision: str, device: str) -> Step:
    left, right = torch.randn(2, SIDES[device], SIDES[device]).to(
        torch.bfloat16 if precision == "bf16" else torch.float32
    )

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right)

    return multiply


def timed(run: Step, clock: Callable[[], float]) -> float:
    """Return the seconds that a run takes, waiting for the GPU if there is one."""
    before = clock()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - before


def memory(what: str) -> int:
    """Return a field of /proc/self/status in bytes, for example VmRSS."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    raise SystemExit("memory is only measured on Linux (it is read from /proc)")


if __name__ == "__main__":
    main()
