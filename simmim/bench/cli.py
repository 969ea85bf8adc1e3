"""The command group `simmim bench`: what its commands take, and tables of memory."""

# ruff: noqa: PLC0415 (what measures imports torch; help and mistakes need none)
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import App, Parameter

from data_prep.bounds import Count, Positive, check_bounds
from data_prep.format.command_line import FLAT, MANY
from data_prep.format.text import count_noun
from simmim.bench.choices import ASSUMPTIONS, GIB, MASK_CELL, Device, Precision, Sharding
from swinv2 import VARIANTS
from swinv2.config import AttentionPath, Checkpointing

if TYPE_CHECKING:
    from simmim.bench.memory import MemoryRow, Placement
    from simmim.bench.step import StepCase

NUMBER = 10
"""Width of a column of numbers."""

_STEP_HEADS = ("variant", "size", "checkpointing")

app = App(
    name="bench",
    help="Count the memory that training needs, and test and time a GPU.",
    group_parameters="Options",
    sort_key=10,
)


def _parse_size(text: str) -> tuple[int, int]:
    image, separator, window = text.partition("/")
    if not separator or not image.isdecimal() or not window.isdecimal() or "0" in (image, window):
        raise ValueError(f"--sizes: {text!r} is not a size: give IMAGE/WINDOW, such as 192/12.")
    if int(image) % MASK_CELL:
        raise ValueError(
            f"--sizes: {image} is not a multiple of the mask cell, {MASK_CELL} pixels."
        )
    return int(image), int(window)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Steps to count, and where."""

    variants: Annotated[tuple[str, ...], MANY] = tuple(VARIANTS)
    """Published variants."""
    sizes: Annotated[tuple[str, ...], MANY] = ("192/12",)
    """Side of the images in pixels and of the windows in tokens, as IMAGE/WINDOW."""
    checkpointing: Annotated[tuple[Checkpointing, ...], MANY] = ("none", "full")
    """Activation checkpointing: what the backward pass recomputes."""
    attention: AttentionPath = "sequential"
    """Attention implementation."""
    precision: Precision = "bf16"
    """Precision of training."""
    batch: Count = 1
    """Images per device."""
    optimizer: bool = True
    """Include AdamW; --no-optimizer is forward and backward only."""
    devices: Annotated[tuple[Count, ...], MANY] = (1, 8, 64)
    """Numbers of devices to shard over."""
    sharding: Annotated[tuple[Sharding, ...], MANY] = get_args(Sharding)
    """Sharding over more than one device, in addition to none."""
    device: Device = "cuda"
    """Kind of device whose rules of precision are counted."""
    compile: bool | None = None
    """Count compiled blocks; by default, as in training, on CUDA."""
    device_memory: Positive | None = None
    """Also list the largest batch that fits this device memory, in GiB."""
    measure: bool = True
    """Also run each step that fits this machine, on its GPU or else its CPU: minutes for large
    ones."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        check_bounds(self, "--")
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(
                    f"--variants: {variant!r} is not published; choose of {', '.join(VARIANTS)}."
                )
        for size in self.sizes:
            _parse_size(size)

    def cases(self) -> "list[StepCase]":
        """Return every step to count."""
        from simmim.bench.step import StepCase
        from simmim.method.strategies import MaskSettings

        return [
            StepCase(
                variant=variant,
                image_size=image_size,
                window_size=window_size,
                attention=self.attention,
                checkpointing=checkpointing,
                precision=self.precision,
                batch=self.batch,
                mask=MaskSettings(cell=min(MASK_CELL, image_size // 2)),
                device=self.device,
                optimizer=self.optimizer,
                compiled=self.device == "cuda" if self.compile is None else self.compile,
            )
            for variant in self.variants
            for image_size, window_size in map(_parse_size, self.sizes)
            for checkpointing in self.checkpointing
        ]

    def placements(self) -> "list[Placement]":
        """Return one whole device, and each sharding over each number of several."""
        from simmim.bench.memory import Placement

        return [Placement(sharding="none", devices=1)] + [
            Placement(sharding=sharding, devices=devices)
            for sharding in self.sharding
            for devices in self.devices
            if sharding != "none" and devices > 1
        ]


def memory(*, options: Annotated[MemoryOptions, FLAT] = MemoryOptions()) -> int:
    """Estimate device memory per variant, size, checkpointing and sharding."""
    from data_prep.format.atomic import atomic_write_text
    from simmim.bench.memory import make_rows

    placements, room = options.placements(), options.device_memory
    rows = make_rows(
        options.cases(),
        placements,
        device_memory=None if room is None else int(room * GIB),
        measure=options.measure,
        say=_say,
    )
    print(memory_table(rows, placements))
    if room is not None:
        print(f"\nLargest batch on a device with {room:g} GiB:\n")
        print(batch_table(rows, placements))
    print(f"\nAssumptions:\n{ASSUMPTIONS}")
    if options.json is not None:
        atomic_write_text(options.json, json.dumps(to_json(rows), indent=1) + "\n")
    return 0


def gpu(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Check training on this GPU, and measure its speed."""
    from simmim.bench.gpu.cli import main

    return main(arguments, program="simmim bench gpu")


app.command(
    memory,
    help="Estimate device memory per variant, size, checkpointing and sharding.\n\n"
    "It is that of a SimMIM training step in GiB: estimated for every placement, and measured on "
    f"this machine if the step fits.\n\n{ASSUMPTIONS}",
)
app.command(gpu, help_flags=(), version_flags=())  # its own parser runs without our dependencies


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def memory_table(rows: "Sequence[MemoryRow]", placements: "Sequence[Placement]") -> str:
    """Return a table of the memory of each step in GiB, estimated per placement and measured."""
    names = [str(placement) for placement in placements]
    measured = any(row.measured for row in rows)
    heads = ["params", "activ.", *names, *(["measured", "ratio", "seconds"] if measured else [])]
    case = rows[0].case
    images = count_noun(case.batch, "image")
    step = "a step" if case.optimizer else "a forward and backward pass"
    blocks = "compiled" if case.compiled else "eager"
    how = f"{case.precision}, attention {case.attention}, {blocks} blocks"
    lines = [
        f"Estimated device memory in GiB for {step} of {images}: {how}\n",
        _line(_STEP_HEADS, heads),
    ]
    for row in rows:
        cells = [f"{row.parameters / 1e6:,.0f} M", _gib(row.activations)]
        cells += [_gib(row.needs[name].total) for name in names]
        if row.measured is not None:
            cells += [
                _gib(row.measured.peak),
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                f"{row.measured.seconds:.0f}",
            ]
        lines.append(_line(_step_cells(row), cells))
    if measured:
        meters = sorted({row.measured.meter for row in rows if row.measured})
        lines.append(
            f"\nmeasured: {', '.join(meters)}. ratio: measured / estimated without sharding."
        )
        if any(row.measured and row.ratio is None for row in rows):
            lines.append("Measured with eager blocks: --no-compile estimates these.")
    return "\n".join(lines)


def batch_table(rows: "Sequence[MemoryRow]", placements: "Sequence[Placement]") -> str:
    """Return the largest batch per device in each placement."""
    names = [str(placement) for placement in placements]
    lines = [_line(_STEP_HEADS, names)]
    lines += [
        _line(_step_cells(row), [f"{row.largest_batch[name]:,}" for name in names]) for row in rows
    ]
    return "\n".join(lines)


def to_json(rows: "Sequence[MemoryRow]") -> list[dict[str, Any]]:
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


def _step_cells(row: "MemoryRow") -> tuple[str, str, str]:
    case = row.case
    return case.variant, f"{case.image_size}/{case.window_size}", str(case.checkpointing)


def _line(step: tuple[str, str, str], cells: Sequence[str]) -> str:
    left = f"{step[0]:<8}{step[1]:<9}{step[2]:<14}"
    return (left + "".join(f"{cell:>{NUMBER}}" for cell in cells)).rstrip()


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
