"""The roofline table of docs/performance.md: `python -m simmim.bench.gpu.performance`."""

import sys
from functools import lru_cache
from typing import get_args

from simmim.bench.gpu.report import table
from simmim.bench.roofline.ceiling import (
    DATA_SHEETS,
    Operation,
    StepSize,
    least_seconds,
    share_of_peak,
)
from simmim.bench.roofline.work import Mode, config_of, step_operations
from swinv2.flops import forward_flops

VARIANTS = ("tiny", "base", "large")
MODES: tuple[Mode, ...] = get_args(Mode)
BATCH = 128
"""Images of a step."""
HEADS = (
    "192/12",
    "blocks",
    "GFLOP an image",
    "MB an image",
    *(f"{name}: {what}" for name in DATA_SHEETS for what in ("images/s", "of the peak")),
)


def rows(variant: str, modes: tuple[Mode, ...] = MODES) -> list[list[str]]:
    """Return the rows of a variant: operations, bytes, and the ceiling on each device."""
    size = StepSize(variant=variant, image_size=192, window_size=12)
    required = forward_flops(config_of(size, {}))
    found = []
    for mode in modes:
        operations = _operations(size, mode)
        flops, moved = (
            sum(getattr(one, name) for one in operations) / BATCH for name in ("flops", "bytes")
        )
        row = [variant, mode, f"{flops / 1e9:.1f}", f"{moved / 1e6:,.0f}"]
        for peaks in DATA_SHEETS.values():
            seconds = least_seconds(operations, peaks)
            share = share_of_peak(required, BATCH, seconds, peaks)
            row += [f"{BATCH / seconds:,.0f}", f"{share:.0%}"]
        found.append(row)
    return found


@lru_cache
def _operations(size: StepSize, mode: Mode) -> list[Operation]:
    return step_operations(size, BATCH, mode)


if __name__ == "__main__":
    sys.stdout.write(table(HEADS, [row for name in VARIANTS for row in rows(name)]) + "\n")
