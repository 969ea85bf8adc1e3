"""The command group `simmim bench`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from data_prep.format.atomic import atomic_write_text
from simmim.bench.memory import ASSUMPTIONS, GIB, Placement, Sharding, make_rows
from simmim.bench.step import MASK_CELL, Precision, StepCase
from simmim.bench.tables import batch_table, memory_table, to_json
from swinv2 import VARIANTS
from swinv2.config import AttentionPath, Checkpointing


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the benches of `simmim bench`."""
    command.description = "Measure what a training needs."
    benches = command.add_subparsers(dest="bench", required=True, metavar="BENCH")
    add_memory(benches)


def add_memory(benches: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `simmim bench memory`."""
    command = benches.add_parser(
        "memory",
        help="memory of a device for each variant, size, checkpointing and sharding",
        description="Memory that a SimMIM training step takes of one device, in GiB: counted for "
        "every placement, and measured on this machine where a whole step fits it.",
        epilog=f"what is counted:\n{ASSUMPTIONS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    variants = list(VARIANTS)
    command.add_argument("--variants", nargs="+", choices=variants, default=variants, metavar="V")
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
        help="what is computed again instead of kept (default: none full)",
    )
    command.add_argument(
        "--attention",
        choices=get_args(AttentionPath),
        default="sequential",
        help="path of attention (default: %(default)s)",
    )
    command.add_argument(
        "--precision", choices=get_args(Precision), default="bf16", help="(default: %(default)s)"
    )
    command.add_argument(
        "--batch", type=_count, default=1, help="images a device (default: %(default)s)"
    )
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
        help="what is counted for more than one device, beside none (default: all)",
    )
    command.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="list the largest batch that fits such a device, too",
    )
    command.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take each step that fits this machine: minutes for large ones (default: yes)",
    )
    command.add_argument(
        "--optimizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="AdamW is part of the step; --no-optimizer is forward and backward (default: yes)",
    )
    command.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    command.set_defaults(handler=run_memory, takes_overrides=False)


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
        print(f"\nImages that a device of {memory:g} GiB takes at most:\n")
        print(batch_table(rows, placements))
    print(f"\nWhat is counted:\n{ASSUMPTIONS}")
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
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give IMAGE/WINDOW, 192/12 say")
    if int(image) % MASK_CELL:
        raise argparse.ArgumentTypeError(f"{image} pixels are not whole mask cells of {MASK_CELL}")
    return int(image), int(window)
