"""The process that runs cells: `python -m simmim.bench.gpu.worker RESULTS DEADLINE`.

A crash, or a fault that spoils the GPU for the whole process, ends it and costs one cell; the
command then starts another.
"""

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from simmim.bench.gpu.cells import Results, run_cells
from simmim.bench.gpu.command import NO_DEVICE, TIME_IS_UP
from simmim.bench.gpu.plan import make_plan
from simmim.bench.gpu.scale import DRY, FULL

SPOILED = 70
"""Exit code: the device no longer answers this process."""


def main(arguments: Sequence[str]) -> int:
    """Run the cells that are not done until a time."""
    path, deadline = arguments
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    results = Results.load(Path(path))
    scale = DRY if results.document["settings"]["dry run"] else FULL
    if scale.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "no CUDA device is found (torch.cuda.is_available() is false): run it on a GPU, or add "
            "--dry-run to run it at tiny sizes on a CPU.\n"
        )
        return NO_DEVICE
    torch.manual_seed(scale.seed)
    plan = make_plan(scale, results)
    if not run_cells(plan, results, deadline=float(deadline), is_usable=_device_answers):
        return SPOILED
    return 0 if results.count_done() >= len(plan) else TIME_IS_UP


def _end_with_the_command() -> None:
    """End when the command ends in any way: it holds the other end of standard input."""
    sys.stdin.read()
    os._exit(1)


def _device_answers() -> bool:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
