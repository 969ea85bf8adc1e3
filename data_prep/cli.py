"""The `data-prep` command line; the commands themselves are in `data_prep.commands`."""

# ruff: noqa: E402 (the system comes first: Windows lacks what the others import)
from data_prep.format.systems import require_posix

require_posix("data-prep")
import argparse
import errno
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from data_prep.executors.processes import (
    InterruptedBySignal,
    LostWorkerError,
    WorkerError,
    available_cores,
    raise_on_signals,
)
from data_prep.format.terminal import CANNOT_WRITE, ExitCode, flush_output, protect_output
from data_prep.format.text import printable_lines
from data_prep.images.settings import FORMATS, MAX_PIXELS, Encoding
from data_prep.sources.files import Selection

_MAX_REJECTED = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ABOUT_LISTS = """A list has one image per row: in a text a path and, after a tab, its label;
elsewhere columns that are found by name (path, file, image; label, class, category, target) or
asked for. Where there are labels, a row without one (empty, NaN, NA, None, -1) is unlabelled;
without any, classes are names of folders. Integers are numbers: 7, 007 and 7.0 are one class, and
names among them are an error. Paths are relative to --root. Rows that cannot be used are in
rejected.jsonl; damage that hides rows is an error that names the line. All rules are in
data_prep/FORMATS.md."""
_TARS = "folder of WebDataset tars, or a pattern: 'DIR/train-*.tar', 'DIR/train-{000..099}.tar'"


def run() -> None:
    """Run the command and leave the process with its exit code."""
    protect_output(optional=False)
    try:
        code: ExitCode = main()
    except SystemExit as ending:
        code = ending.code
    except OSError:  # of a message that could not be written either
        code = CANNOT_WRITE
    sys.exit(flush_output(code))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program name; None: those of the process.

    Returns:
        0 on success, 2 on bad input, 76 if a worker was lost (the same command resumes), 1 if one
        failed otherwise, 128 + signal number if interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        with raise_on_signals() as interruption:
            # Imported late, since `--help` and mistyped arguments need neither NumPy nor Pillow.
            from data_prep.commands import run_command  # noqa: PLC0415

            return run_command(arguments, interruption)
    except InterruptedBySignal as interrupt:
        remedy = "; run the same command again to resume" if "source" in arguments else ""
        print(f"data-prep: stopped{remedy}.", file=sys.stderr)
        return 128 + interrupt.number
    except (ValueError, OSError) as error:
        print(f"data-prep: {printable_lines(_describe(error))}", file=sys.stderr)
        return 2
    except MemoryError:
        advice = "lower --workers or --max-pixels, or give the job more memory"
        print(f"data-prep: memory ran out: {advice}.", file=sys.stderr)
        return 76
    except WorkerError as error:
        print(f"data-prep: {printable_lines(error)}", file=sys.stderr)
        return 76 if isinstance(error, LostWorkerError) else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable_lines(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="data-prep",
        description="Write, check and summarize WebDataset shards of images for training.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shard = _add_command(
        commands, "shard", "write images as shards, with classes from folder names"
    )
    reshard = _add_command(
        commands, "reshard", "write the samples of existing shards as new shards"
    )
    for command in (shard, reshard):
        _add_shard_arguments(command)
    merge = _add_command(commands, "merge", "merge the parts written with --part into one set")
    _add_max_rejected(merge)
    index = _add_command(
        commands, "index", "write manifest and indexes for existing WebDataset tars"
    )
    index.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
    _add_globs(
        index,
        {
            "--include": "use only tars whose names match, as in 'train-*.tar' or "
            "'train-{000..099}.tar'",
            "--exclude": "leave out tars whose names match",
        },
    )
    index.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for manifest and indexes if the folder of the tars is not writable",
    )
    verify = _add_command(commands, "verify", "read shards back and compare them with the manifest")
    depth = verify.add_mutually_exclusive_group()
    depth.add_argument(
        "--fast",
        action="store_true",
        help="compare lengths, checksums and indexes; this is the default, since `shard` decodes "
        "every image before writing it, and checksums show that none has changed",
    )
    depth.add_argument(
        "--deep", action="store_true", help="decode every image too, for example after `index`"
    )
    info = _add_command(commands, "info", "summarize a folder of shards")
    info.add_argument(
        "--statistics",
        action="store_true",
        help="measure mean and standard deviation per channel, and write statistics.json",
    )
    info.add_argument(
        "--contact-sheet", type=Path, metavar="PNG", help="draw samples of the set as a picture"
    )
    info.add_argument(
        "--bands",
        type=int,
        nargs="+",
        metavar="N",
        help="bands of the contact sheet, counted from 0: three as red, green and blue, or one in "
        "grey; None: the first three, or the first of fewer",
    )
    for command in (index, verify, info):
        command.add_argument(
            "--allow-pipe",
            action="store_true",
            help="allow shards that are the output of commands, which are run: "
            "index 'pipe:COMMAND' --output FOLDER",
        )
    for command in (shard, reshard, index, verify):
        command.add_argument(
            "--allow-missing-end",
            action="store_true",
            help="warn of tars without an end mark instead of refusing them: some programs leave "
            "it out, but a tar that was cut looks the same",
        )
    for command in (shard, reshard, index, verify, info):
        _add_workers(command)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[_Parser]", name: str, about: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if name == "shard":
        about = (
            "folder, zip, tar (also compressed) or list (txt, tsv, csv, jsonl, parquet) of images; "
            "path or URL"
        )
        parser.add_argument("source", help=about)
        parser.epilog = _ABOUT_LISTS
    elif name == "reshard":
        parser.add_argument("source", help=f"{_TARS}; path or URL")
    about = "folder of shards" if name != "index" else _TARS
    parser.add_argument("folder", help=f"{about}; path or URL (s3, gs, http)")
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=available_cores(),
        metavar="N",
        help="number of processes; the bytes written do not depend on it",
    )


def _describe(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            f"the disk is full: {error.strerror}, at {error.filename or 'an unnamed file'}. Make "
            "room there (temporary files are in TMPDIR), or give a folder on another disk, and run "
            "the same command again; finished shards are kept."
        )
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        return f"cannot continue{place}: {error.strerror}."
    return str(error)


def _add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments for writing shards except the number of workers."""
    numbers = {
        "--samples-per-shard": (
            None,
            "maximum samples per shard; None: the least of 10,000, 256 MiB and 1/8 of all samples",
        ),
        "--bytes-per-shard": (
            None,
            "maximum bytes of source images per shard; shards are filled one after another",
        ),
        "--max-pixels": (MAX_PIXELS, "reject images with more pixels"),
        "--max-bytes": (Selection().max_bytes, "reject image files with more bytes"),
        "--shuffle-window": (
            None,
            "shuffle within windows of N files in source order; None: all files, listed first",
        ),
    }
    for name, (default, about) in numbers.items():
        parser.add_argument(name, type=_positive, metavar="N", default=default, help=about)
    texts = {
        "--root": (None, "folder that the paths of a list are relative to; None: the list's own"),
        "--path-column": (None, "column with the paths of a list; None: path, file, image, ..."),
        "--label-column": (
            None,
            (
                "column with the labels of a list, where a row without label is unlabelled; None: "
                "label, class, category, target, ..."
            ),
        ),
        "--split-column": ("split", "column or JSON field with the split"),
        "--only-split": (None, "use this split only; None: all"),
    }
    for name, (text, about) in texts.items():
        parser.add_argument(name, metavar="NAME", default=text, help=about)
    globs = {
        "--include": "use only paths that match, whatever their suffix; * also matches /",
        "--exclude": "skip paths that match; * also matches /",
    }
    _add_globs(parser, globs)
    _add_encoding(parser)
    _add_split(parser)
    switches = {
        "--no-shuffle": "keep the order of the source (folders: by path), like --shuffle-window 1",
        "--no-check": "read image headers only, without decoding the images",
        "--deduplicate": "of files with identical bytes, keep the one with the smallest path",
        "--overwrite": "replace shards written with other options or from other input",
    }
    for name, about in switches.items():
        parser.add_argument(name, action="store_true", help=about)
    _add_channel_axis(parser)
    _add_execution(parser)


def _add_channel_axis(parser: argparse.ArgumentParser) -> None:
    axis = parser.add_mutually_exclusive_group()
    axes = {
        "first": "arrays (.npy) with three axes are channels x height x width; without this and "
        "--channels-last, few channels before rows and columns, like 5x224x224, are recognised",
        "last": "arrays with three axes are height x width x channels, whatever their shape",
    }
    for name, about in axes.items():
        axis.add_argument(
            f"--channels-{name}",
            action="store_const",
            const=name,
            dest="channel_axis",
            default="auto",
            help=about,
        )


def _add_globs(parser: argparse.ArgumentParser, globs: Mapping[str, str]) -> None:
    for name, about in globs.items():
        parser.add_argument(
            name, action="append", metavar="GLOB", default=[], help=f"{about}; may be repeated"
        )


def _add_max_rejected(parser: argparse.ArgumentParser) -> None:
    """Add the limit on rejected images."""
    parser.add_argument(
        "--max-rejected",
        type=float,
        metavar="FRACTION",
        default=_MAX_REJECTED,
        help="fail if a larger fraction of images is rejected (duplicates not counted)",
    )


def _positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    numbers = {
        "--max-side": (None, "shrink pictures whose longer side has more pixels"),
        "--short-side": (None, "shrink pictures whose shorter side has more pixels"),
        "--quality": (Encoding().quality, "quality of re-encoded JPEG and WebP; 4:4:4 from 90"),
    }
    for name, (default, about) in numbers.items():
        parser.add_argument(name, type=_positive, metavar="N", default=default, help=about)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=Encoding().format,
        help="format of all pictures; keep: JPEG, PNG and WebP byte for byte, others as PNG",
    )


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="FRACTION",
        default=0.0,
        help="fraction of samples for validation, chosen by path and seed, in the last shards",
    )
    parser.add_argument(
        "--near-duplicates",
        type=int,
        metavar="BITS",
        help="drop images whose perceptual hash differs from that of an image with a smaller path "
        "by at most BITS of 64",
    )


def _add_execution(parser: argparse.ArgumentParser) -> None:
    _add_max_rejected(parser)
    parser.add_argument(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help="write shards in local processes or on a Ray cluster",
    )
    parser.add_argument("--address", help="address of the Ray cluster; None: start a local one")
    parser.add_argument(
        "--staging",
        type=Path,
        metavar="FOLDER",
        help="local folder for shards until they are uploaded to a URL (at most 3 per worker); a "
        "stopped run resumes from it; None: in the user's cache",
    )
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="write only this part of the shards, from 1/N to N/N; finish with `data-prep merge`",
    )


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1/N to N/N")
    return int(match[1]), int(match[2])
