"""The commands `simmim export` and `simmim import`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from simmim.export.export import FORMATS, export
from simmim.export.import_encoder import IMPORT_FORMATS, ImportOptions, import_encoder
from swinv2.bridges.sizes import PretrainedWindows


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `simmim export`."""
    command.description = (
        "Export the encoder of a run's best checkpoint (its last where none is the best), or of an "
        "encoder directory. The native format includes the head of a fine-tuned model."
    )
    command.add_argument(
        "source", metavar="RUN", type=Path, help="run folder, checkpoint or encoder directory"
    )
    command.add_argument("destination", metavar="DST", type=Path, help="output folder")
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="native",
        help="native: an encoder directory with any head; transformers, timm: in the format of "
        "these libraries; reference: a checkpoint of the published code; onnx, torch-export: a "
        "graph that runs without this code (default: %(default)s)",
    )
    command.add_argument(
        "--any-size",
        action="store_true",
        help="onnx and torch-export: dynamic height and width (default: the encoder's size)",
    )
    command.set_defaults(handler=run_export)


def run_export(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim export`."""
    del overrides
    lines = export(
        arguments.source,
        arguments.destination,
        arguments.format,
        any_size=arguments.any_size,
        best=arguments.best,
    )
    print("\n".join(lines))
    return 0


def add_import_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `simmim import`."""
    command.description = (
        "Convert a third-party Swin Transformer V2 checkpoint to an encoder directory. Sizes are "
        "read from the file; give those that it does not record. Code in the file is never run."
    )
    command.add_argument("source", metavar="SRC", type=Path, help="checkpoint file or folder")
    command.add_argument("destination", metavar="DST", type=Path, help="output folder")
    command.add_argument(
        "--format",
        required=True,
        choices=IMPORT_FORMATS,
        help="reference: the published code (Swin Transformer, SimMIM); timm: its swinv2 models; "
        "transformers: a folder written by save_pretrained of a Swinv2 class",
    )
    command.add_argument(
        "--architecture", metavar="NAME", help="timm's name of the model, which implies all sizes"
    )
    command.add_argument(
        "--image-size", metavar="N|H,W", type=_size, help="training image size in pixels"
    )
    command.add_argument("--window-size", metavar="N|H,W", type=_size, help="window size in tokens")
    command.add_argument(
        "--pretrained-windows",
        metavar="same|N,N,...",
        type=_windows,
        help="pretraining window of each stage in tokens; same: the present windows",
    )
    for name in ("mean", "std"):
        command.add_argument(
            f"--{name}",
            metavar="X,X,...",
            type=_numbers,
            help=f"{name} per channel, images in [0, 1] (default: from the file, or ImageNet's)",
        )
    command.set_defaults(handler=run_import)


def run_import(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim import`."""
    del overrides
    known = ImportOptions(
        architecture=arguments.architecture,
        image_size=arguments.image_size,
        window_size=arguments.window_size,
        pretrained_window_sizes=arguments.pretrained_windows,
        mean=arguments.mean,
        std=arguments.std,
    )
    lines = import_encoder(arguments.source, arguments.destination, arguments.format, known)
    print("\n".join(lines))
    return 0


def _size(text: str) -> int | tuple[int, int]:
    match [int(part) for part in text.split(",")]:
        case [side]:
            return side
        case [height, width]:
            return height, width
    raise argparse.ArgumentTypeError(f"{text!r} is not a size: give a number, or height,width")


def _windows(text: str) -> PretrainedWindows:
    return "same" if text == "same" else [int(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
