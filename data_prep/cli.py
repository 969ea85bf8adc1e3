"""The `data-prep` command: images into shards, and shards looked after."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from data_prep.adopt import adopt_shards
from data_prep.build import Built, Plan, Progress, build_shards
from data_prep.destination import REJECTED_NAME
from data_prep.images import MAX_PIXELS
from data_prep.info import describe_bytes, describe_shards
from data_prep.manifest import read_manifest
from data_prep.plan import ShardOptions
from data_prep.sources import Selection
from data_prep.storage import RemotePath, locate
from data_prep.upload import upload_set
from data_prep.verify import verify_shards
from data_prep.workers import WorkerError, available_cores


class InterruptedBySignal(KeyboardInterrupt):
    """SIGINT or SIGTERM was received."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run() -> None:
    """Run the command and leave the process with its exit code."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        0 on success, 2 on bad input, 1 if a worker died, 128 + the signal if interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        with _raise_on_signals():
            return _dispatch(arguments)
    except InterruptedBySignal as interrupt:
        remedy = "; run the same command again to go on" if arguments.command == "shard" else ""
        print(f"data-prep: stopped{remedy}.", file=sys.stderr)
        return 128 + interrupt.number
    except (ValueError, OSError) as error:
        print(f"data-prep: {_describe(error)}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"data-prep: {error}", file=sys.stderr)
        return 1


def _dispatch(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "shard":
            return _shard(arguments)
        case "index":
            return _index(arguments)
        case "verify":
            return _verify(arguments)
        case command:
            assert command == "info", command
            print(describe_shards(read_manifest(locate(arguments.folder))))
            return 0


def _shard(arguments: argparse.Namespace) -> int:
    options = ShardOptions(
        samples_per_shard=arguments.samples_per_shard,
        selection=Selection(
            include=tuple(arguments.include),
            exclude=tuple(arguments.exclude),
            max_bytes=arguments.max_bytes,
        ),
        seed=arguments.seed,
        shuffle=not arguments.no_shuffle,
        check=not arguments.no_check,
        max_pixels=arguments.max_pixels,
    )
    destination = locate(arguments.folder)
    # Shards for a store are made on this machine first, where a stopped run finds them again.
    folder = destination if isinstance(destination, Path) else _staging(destination, arguments)
    with _bar() as bar:

        def planned(plan: Plan) -> None:
            print(_describe_plan(plan, arguments.source))
            bar.total, bar.initial, bar.n = plan.found, plan.done, plan.done
            bar.refresh()

        built = build_shards(
            arguments.source,
            folder,
            options,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            progress=Progress(planned=planned, tick=bar.update),
        )
    if isinstance(destination, RemotePath):
        uploaded = upload_set(built.manifest, destination, overwrite=arguments.overwrite)
        shutil.rmtree(folder)
        built = replace(built, manifest=uploaded)
    print(_describe_built(built))
    return 0


def _staging(destination: RemotePath, arguments: argparse.Namespace) -> Path:
    """Return the folder that the shards of a remote set are made in, the same for every run."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parent = arguments.staging or caches / "data-prep"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(parent, hashlib.sha256(destination.url.encode()).hexdigest()[:16])


def _index(arguments: argparse.Namespace) -> int:
    with _bar() as bar:
        adopted = adopt_shards(
            locate(arguments.folder),
            output=arguments.output,
            overwrite=arguments.overwrite,
            workers=arguments.workers,
            tick=bar.update,
        )
    manifest = adopted.manifest
    print(
        f"{manifest.samples:,} samples in {len(manifest.shards):,} shards, "
        f"classes: {len(manifest.classes):,}, in {manifest.folder}"
    )
    if adopted.without_image:
        print(f"left out: {adopted.without_image:,} samples that hold no image")
    if adopted.empty:
        print(f"left out: tars without any image: {', '.join(adopted.empty)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(locate(arguments.folder))
    with _bar(manifest.samples) as bar:
        problems = verify_shards(
            manifest, decode=not arguments.fast, workers=arguments.workers, tick=bar.update
        )
    if problems:
        number = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
        lines = [f"data-prep: {manifest.folder} has {number}; make the shards again:", *problems]
        print("\n  ".join(lines), file=sys.stderr)
        return 2
    looked = "checksums and indexes" if arguments.fast else "checksums, indexes and images"
    print(f"{manifest.samples:,} samples in {len(manifest.shards):,} shards: {looked} are right")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data-prep",
        description="Images into WebDataset shards that training streams from.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_shard_parser(commands)
    index = _add_command(commands, "index", "make manifest and indexes for tars someone else wrote")
    index.add_argument("--overwrite", action="store_true", help="replace a manifest that is there")
    index.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for manifest and indexes, where that of the tars cannot be written to",
    )
    verify = _add_command(commands, "verify", "read shards back and compare with the manifest")
    verify.add_argument("--fast", action="store_true", help="do not decode the images")
    for command in (index, verify):
        _add_workers(command)
    _add_command(commands, "info", "show what a folder of shards holds")
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, about: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if name == "shard":
        parser.add_argument("source", type=Path, help="folder, zip or uncompressed tar of images")
    parser.add_argument("folder", help="folder of shards, or its URL (s3, gs, http)")
    return parser


def _add_shard_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, "shard", "write images as shards, classes from parent folders")
    numbers = {
        "--samples-per-shard": (
            None,
            "most samples in a shard; None: the least of 10,000, 256 MiB and an 8th of all",
        ),
        "--max-pixels": (MAX_PIXELS, "largest image taken, in pixels"),
        "--max-bytes": (Selection().max_bytes, "largest image file taken, in bytes"),
    }
    for name, (default, about) in numbers.items():
        parser.add_argument(name, type=_positive, metavar="N", default=default, help=about)
    globs = {
        "--include": "take paths that match, whatever their suffix; * also matches /",
        "--exclude": "leave out paths that match; * also matches /",
    }
    for name, about in globs.items():
        parser.add_argument(
            name, action="append", metavar="GLOB", default=[], help=f"{about}; may be repeated"
        )
    parser.add_argument(
        "--staging",
        type=Path,
        metavar="FOLDER",
        help="folder that shards for a URL are made in until uploaded; None: in the user's cache",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle over all samples")
    switches = {
        "--no-shuffle": "keep samples in the order of their paths",
        "--no-check": "read image headers only, do not decode",
        "--overwrite": "replace shards made from other options or other input",
    }
    for name, about in switches.items():
        parser.add_argument(name, action="store_true", help=about)
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=available_cores(),
        metavar="N",
        help="processes; what is written does not depend on it",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _bar(total: int | None = None) -> tqdm[NoReturn]:
    # disable=None: drawn only where someone can see it.
    return tqdm(total=total, unit=" images", unit_scale=True, disable=None, dynamic_ncols=True)


def _describe_plan(plan: Plan, source: Path) -> str:
    text = f"found {plan.found:,} images, classes: {plan.classes:,}, in {source}"
    if plan.finished:
        text += f"; {plan.finished:,} of {plan.shards:,} shards are finished already"
    return f"{text}; writing {plan.shards - plan.finished:,} shards, {plan.workers} at a time"


def _describe_built(built: Built) -> str:
    manifest = built.manifest
    length = describe_bytes(sum(shard.bytes for shard in manifest.shards))
    counts = (
        f"accepted {manifest.samples:,} + rejected {manifest.rejected:,} = {built.found:,} found"
    )
    if manifest.rejected:
        counts += f"; see {manifest.folder / REJECTED_NAME}"
    verb = "already complete" if built.was_complete else "complete"
    return f"{counts}\n{verb}: {len(manifest.shards):,} shards, {length}, in {manifest.folder}"


def _describe(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        return f"cannot go on{place}: {error.strerror}."
    return str(error)


@contextmanager
def _raise_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an exception, so that what is half done is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise InterruptedBySignal(number)

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
