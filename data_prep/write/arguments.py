"""Command-line arguments of `data-prep shard` and `reshard`, and the options they set."""

import argparse
import re
from pathlib import Path

from data_prep.images.checking import MAX_PIXELS
from data_prep.images.encoding import FORMATS, Encoding
from data_prep.sources.files import Selection
from data_prep.write.execution import Execution
from data_prep.write.plan import ShardOptions

DEFAULT_MAX_REJECTED = 0.05
"""Default of the largest fraction of images that may be rejected."""


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments for writing shards except the number of workers."""
    numbers = {
        "--samples-per-shard": (
            None,
            "maximum samples per shard; None: the least of 10,000, 256 MiB, and an 8th of all",
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
        parser.add_argument(name, type=positive, metavar="N", default=default, help=about)
    texts = {
        "--root": (None, "folder that the paths of a list are relative to; None: the list's own"),
        "--split-column": ("split", "column or JSON field with the split"),
        "--only-split": (None, "use this split only; None: all"),
    }
    for name, (text, about) in texts.items():
        parser.add_argument(name, metavar="NAME", default=text, help=about)
    globs = {
        "--include": "use only paths that match, whatever their suffix; * also matches /",
        "--exclude": "skip paths that match; * also matches /",
    }
    for name, about in globs.items():
        parser.add_argument(
            name, action="append", metavar="GLOB", default=[], help=f"{about}; may be repeated"
        )
    _add_encoding(parser)
    _add_split(parser)
    switches = {
        "--no-shuffle": "keep the order of the source (folders: by path), like --shuffle-window 1",
        "--no-check": "read image headers only, without decoding the images",
        "--deduplicate": "of files with identical bytes, keep the one with the smallest path",
        "--overwrite": "replace shards written from other options or other input",
    }
    for name, about in switches.items():
        parser.add_argument(name, action="store_true", help=about)
    _add_execution(parser)


def add_max_rejected(parser: argparse.ArgumentParser) -> None:
    """Add the limit on rejected images."""
    parser.add_argument(
        "--max-rejected",
        type=float,
        metavar="SHARE",
        default=DEFAULT_MAX_REJECTED,
        help="fail if a larger fraction of images is rejected (duplicates not counted)",
    )


def parse_options(arguments: argparse.Namespace) -> ShardOptions:
    """Return the options that determine what is written."""
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
    """Return the options for how the work is done."""
    return Execution(
        workers=arguments.workers,
        ray=arguments.executor == "ray",
        address=arguments.address,
        part=arguments.part,
        max_rejected=arguments.max_rejected,
    )


def positive(text: str) -> int:
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
        parser.add_argument(name, type=positive, metavar="N", default=default, help=about)
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
        metavar="SHARE",
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
    add_max_rejected(parser)
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
