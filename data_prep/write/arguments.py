"""Arguments of `data-prep shard` and `reshard`, and the options they stand for."""

import argparse
import re
from pathlib import Path

from data_prep.images.checking import MAX_PIXELS
from data_prep.images.encoding import FORMATS, Encoding
from data_prep.sources.files import Selection
from data_prep.write.execution import Execution
from data_prep.write.plan import ShardOptions

DEFAULT_MAX_REJECTED = 0.05
"""Largest share of images that may be rejected unless told otherwise."""


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of writing shards but the number of workers."""
    numbers = {
        "--samples-per-shard": (
            None,
            "most samples in a shard; None: the least of 10,000, 256 MiB and an 8th of all",
        ),
        "--bytes-per-shard": (
            None,
            "most bytes of the source's images in a shard, filled one after another",
        ),
        "--max-pixels": (MAX_PIXELS, "largest image taken, in pixels"),
        "--max-bytes": (Selection().max_bytes, "largest image file taken, in bytes"),
        "--shuffle-window": (
            None,
            "shuffle among N files in the source's order; None: among all, which are listed first",
        ),
    }
    for name, (default, about) in numbers.items():
        parser.add_argument(name, type=positive, metavar="N", default=default, help=about)
    texts = {
        "--root": (None, "folder that paths of a list begin in; None: the folder of the list"),
        "--split-column": ("split", "column or JSON field that names the split"),
        "--only-split": (None, "split to take; None: all"),
    }
    for name, (text, about) in texts.items():
        parser.add_argument(name, metavar="NAME", default=text, help=about)
    globs = {
        "--include": "take paths that match, whatever their suffix; * also matches /",
        "--exclude": "leave out paths that match; * also matches /",
    }
    for name, about in globs.items():
        parser.add_argument(
            name, action="append", metavar="GLOB", default=[], help=f"{about}; may be repeated"
        )
    _add_encoding(parser)
    _add_shares(parser)
    switches = {
        "--no-shuffle": "keep the source's order, in folders that of paths; as --shuffle-window 1",
        "--no-check": "read image headers only, do not decode",
        "--deduplicate": "of files with the same bytes keep the one with the smallest path",
        "--overwrite": "replace shards made from other options or other input",
    }
    for name, about in switches.items():
        parser.add_argument(name, action="store_true", help=about)
    _add_execution(parser)


def add_max_rejected(parser: argparse.ArgumentParser) -> None:
    """Add the ceiling on rejected images."""
    parser.add_argument(
        "--max-rejected",
        type=float,
        metavar="SHARE",
        default=DEFAULT_MAX_REJECTED,
        help="largest share of images that may be rejected, duplicates not counted",
    )


def parse_options(arguments: argparse.Namespace) -> ShardOptions:
    """Return the options that decide what is written."""
    return ShardOptions(
        samples_per_shard=arguments.samples_per_shard,
        bytes_per_shard=arguments.bytes_per_shard,
        selection=Selection(
            include=tuple(arguments.include),
            exclude=tuple(arguments.exclude),
            max_bytes=arguments.max_bytes,
            split_column=arguments.split_column,
            only_split=arguments.only_split,
            root=arguments.root,
        ),
        seed=arguments.seed,
        shuffle=not arguments.no_shuffle,
        shuffle_window=arguments.shuffle_window,
        validation_fraction=arguments.validation_fraction,
        deduplicate=arguments.deduplicate,
        near_duplicates=arguments.near_duplicates,
        check=not arguments.no_check,
        max_pixels=arguments.max_pixels,
        encoding=Encoding(
            max_side=arguments.max_side,
            short_side=arguments.short_side,
            format=arguments.format,
            quality=arguments.quality,
        ),
    )


def parse_execution(arguments: argparse.Namespace) -> Execution:
    """Return how the work is to be done."""
    return Execution(
        workers=arguments.workers,
        ray=arguments.executor == "ray",
        address=arguments.address,
        part=arguments.part,
        max_rejected=arguments.max_rejected,
    )


def positive(text: str) -> int:
    """Return the number, at least 1, that an argument says."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    numbers = {
        "--max-side": (None, "shrink pictures whose longer side has more pixels"),
        "--short-side": (None, "shrink pictures whose shorter side has more pixels"),
        "--quality": (Encoding().quality, "of JPEG and WebP written anew; JPEG is 4:4:4 from 90"),
    }
    for name, (default, about) in numbers.items():
        parser.add_argument(name, type=positive, metavar="N", default=default, help=about)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=Encoding().format,
        help="of all pictures; keep: bytes of JPEG, PNG and WebP as they are, others to PNG",
    )


def _add_shares(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle over all samples")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="SHARE",
        default=0.0,
        help="share of samples, chosen by path and seed, that the last shards hold",
    )
    parser.add_argument(
        "--near-duplicates",
        type=int,
        metavar="BITS",
        help="drop images whose perceptual hashes differ by at most BITS of 64 from a smaller path",
    )


def _add_execution(parser: argparse.ArgumentParser) -> None:
    add_max_rejected(parser)
    parser.add_argument(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help="what shards are written by: processes of this machine, or a Ray cluster",
    )
    parser.add_argument(
        "--address", help="address of the Ray cluster; None starts one on this machine"
    )
    parser.add_argument(
        "--staging",
        type=Path,
        metavar="FOLDER",
        help="folder that shards for a URL wait in until uploaded, 3 for each worker at most, and "
        "where a stopped run goes on; None: in the user's cache",
    )
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="write this part of the shards alone, from 1/N to N/N; then `data-prep merge`",
    )


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1/N to N/N")
    return int(match[1]), int(match[2])
