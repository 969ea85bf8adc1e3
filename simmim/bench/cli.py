"""The command group `simmim bench`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from data_prep.format.atomic import atomic_write_text
from data_prep.format.text import count_noun
from simmim.bench.gpu.cli import add_gpu
from simmim.bench.memory import ASSUMPTIONS, GIB, MemoryRow, Placement, Sharding, make_rows
from simmim.bench.step import MASK_CELL, Device, Precision, StepCase
from swinv2 import VARIANTS
from swinv2.config import AttentionPath, Checkpointing

NUMBER = 10
"""Width of a column of numbers."""

_STEP_HEADS = ("variant", "size", "checkpointing")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the benchmarks of `simmim bench`."""
    command.description = "Benchmarks of training."
    benches = command.add_subparsers(dest="bench", required=True, metavar="BENCH")
    add_memory(benches)
    add_gpu(benches)


def add_memory(benches: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `simmim bench memory`."""
    command = benches.add_parser(
        "memory",
        help="estimate device memory per variant, size, checkpointing and sharding",
        description="Device memory of a SimMIM training step in GiB: estimated for every "
        "placement, and measured on this machine if the step fits.",
        epilog=f"assumptions:\n{ASSUMPTIONS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_step_arguments(command)
    _add_device_arguments(command)
    command.set_defaults(handler=run_memory, takes_overrides=False)


def _add_step_arguments(command: argparse.ArgumentParser) -> None:
    variants = list(VARIANTS)
    command.add_argument(
        "--variants",
        nargs="+",
        choices=variants,
        default=variants,
        metavar="NAME",
        help=f"published variants: {', '.join(variants)} (default: all)",
    )
    command.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[(192, 12)],
        metavar="IMAGE/WINDOW",
        help="side of the images in pixels and of the windows in tokens (default: 192/12)",
    )
    command.add_argument(
        "--checkpointing",
        nargs="+",
        choices=get_args(Checkpointing),
        default=["none", "full"],
        help="activation checkpointing: what the backward pass recomputes (default: none full)",
    )
    command.add_argument(
        "--attention",
        choices=get_args(AttentionPath),
        default="sequential",
        help="attention implementation (default: %(default)s)",
    )
    command.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="bf16",
        help="precision of training (default: %(default)s)",
    )
    command.add_argument(
        "--batch", type=_count, default=1, help="images per device (default: %(default)s)"
    )
    command.add_argument(
        "--optimizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="include AdamW; --no-optimizer is forward and backward only (default: yes)",
    )


def _add_device_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--devices",
        nargs="+",
        type=_count,
        default=[1, 8, 64],
        metavar="N",
        help="devices to shard over (default: 1 8 64)",
    )
    command.add_argument(
        "--sharding",
        nargs="+",
        choices=get_args(Sharding),
        default=list(get_args(Sharding)),
        help="sharding over more than one device, in addition to none (default: all)",
    )
    command.add_argument(
        "--device",
        choices=get_args(Device),
        default="cuda",
        help="kind of device whose rules of precision are counted (default: %(default)s)",
    )
    command.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="also list the largest batch that fits this device memory",
    )
    command.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run each step that fits this machine, on its GPU or else its CPU: "
        "minutes for large ones (default: yes)",
    )
    command.add_argument(
        "--json", type=Path, metavar="PATH", help="also write the figures to this file"
    )


def run_memory(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim bench memory`."""
    del overrides
    placements = _placements(arguments)
    memory: float | None = arguments.device_memory
    rows = make_rows(
        _cases(arguments),
        placements,
        device_memory=None if memory is None else int(memory * GIB),
        measure=arguments.measure,
        say=_say,
    )
    print(memory_table(rows, placements))
    if memory is not None:
        print(f"\nLargest batch on a device with {memory:g} GiB:\n")
        print(batch_table(rows, placements))
    print(f"\nAssumptions:\n{ASSUMPTIONS}")
    if arguments.json is not None:
        atomic_write_text(arguments.json, json.dumps(to_json(rows), indent=1) + "\n")
    return 0


def _cases(arguments: argparse.Namespace) -> list[StepCase]:
    return [
        StepCase(
            variant=variant,
            image_size=image_size,
            window_size=window_size,
            attention=arguments.attention,
            checkpointing=checkpointing,
            precision=arguments.precision,
            batch=arguments.batch,
            device=arguments.device,
            optimizer=arguments.optimizer,
        )
        for variant in arguments.variants
        for image_size, window_size in arguments.sizes
        for checkpointing in arguments.checkpointing
    ]


def _placements(arguments: argparse.Namespace) -> list[Placement]:
    """Return one whole device, and each sharding over each number of several."""
    return [Placement(sharding="none", devices=1)] + [
        Placement(sharding=sharding, devices=devices)
        for sharding in arguments.sharding
        for devices in arguments.devices
        if sharding != "none" and devices > 1
    ]


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _size(text: str) -> tuple[int, int]:
    image, separator, window = text.partition("/")
    if not separator or not image.isdecimal() or not window.isdecimal() or "0" in (image, window):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: give IMAGE/WINDOW, such as 192/12"
        )
    if int(image) % MASK_CELL:
        raise argparse.ArgumentTypeError(
            f"{image} is not a multiple of the mask cell, {MASK_CELL} pixels"
        )
    return int(image), int(window)


def memory_table(rows: Sequence[MemoryRow], placements: Sequence[Placement]) -> str:
    """Return a table of the memory of each step in GiB, estimated per placement and measured."""
    names = [str(placement) for placement in placements]
    measured = any(row.measured for row in rows)
    heads = ["params", "activ.", *names, *(["measured", "ratio", "seconds"] if measured else [])]
    case = rows[0].case
    images = count_noun(case.batch, "image")
    step = "a step" if case.optimizer else "a forward and backward pass"
    how = f"{case.precision}, attention {case.attention}, eager blocks"
    lines = [
        f"Estimated device memory in GiB for {step} of {images}: {how}\n",
        _line(_STEP_HEADS, heads),
    ]
    for row in rows:
        cells = [f"{row.parameters / 1e6:,.0f} M", _gib(row.activations)]
        cells += [_gib(row.needs[name].total) for name in names]
        if row.measured is not None and row.ratio is not None:
            cells += [
                _gib(row.measured.peak),
                f"{row.ratio:.2f}",
                f"{row.measured.seconds:.0f}",
            ]
        lines.append(_line(_step_cells(row), cells))
    if measured:
        meters = sorted({row.measured.meter for row in rows if row.measured})
        lines.append(
            f"\nmeasured: {', '.join(meters)}. ratio: measured / estimated without sharding."
        )
    return "\n".join(lines)


def batch_table(rows: Sequence[MemoryRow], placements: Sequence[Placement]) -> str:
    """Return the largest batch per device in each placement."""
    names = [str(placement) for placement in placements]
    lines = [_line(_STEP_HEADS, names)]
    lines += [
        _line(_step_cells(row), [f"{row.largest_batch[name]:,}" for name in names]) for row in rows
    ]
    return "\n".join(lines)


def to_json(rows: Sequence[MemoryRow]) -> list[dict[str, Any]]:
    """Return the rows as JSON values; memory in bytes."""
    return [
        asdict(row)
        | {
            "needs": {
                name: asdict(need) | {"total": need.total} for name, need in row.needs.items()
            },
            "ratio": row.ratio,
        }
        for row in rows
    ]


def _step_cells(row: MemoryRow) -> tuple[str, str, str]:
    case = row.case
    return case.variant, f"{case.image_size}/{case.window_size}", str(case.checkpointing)


def _line(step: tuple[str, str, str], cells: Sequence[str]) -> str:
    left = f"{step[0]:<8}{step[1]:<9}{step[2]:<14}"
    return (left + "".join(f"{cell:>{NUMBER}}" for cell in cells)).rstrip()


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
