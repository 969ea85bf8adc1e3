"""The `data-prep` command: write, merge, index, verify and summarize shards of images."""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_prep.executors.processes import (
    InterruptedBySignal,
    Interruption,
    WorkerError,
    available_cores,
    raise_on_signals,
)
from data_prep.format.manifest import Manifest, read_manifest
from data_prep.format.pipes import PIPE, PipedFile
from data_prep.format.statistics_file import STATISTICS_NAME, write_statistics
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.inspect.contact_sheet import draw_contact_sheet
from data_prep.inspect.index_existing import index_existing
from data_prep.inspect.info import describe_shards, describe_statistics, format_bytes
from data_prep.inspect.statistics import measure_set
from data_prep.inspect.verify import MAX_PROBLEMS, verify_shards
from data_prep.write.arguments import (
    add_max_rejected,
    add_shard_arguments,
    parse_execution,
    parse_options,
    positive,
)
from data_prep.write.build import BuildResult, build_shards, merge_parts
from data_prep.write.execution import PlanSummary, Progress
from data_prep.write.output_dir import REJECTED_NAME, refuse_inside
from data_prep.write.shard import ShardReport

if TYPE_CHECKING:
    from tqdm import tqdm


def run() -> None:
    """Run the command and leave the process with its exit code."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program name; None: those of the process.

    Returns:
        0 on success, 2 on bad input, 1 if a worker died, 128 + signal number if interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        with raise_on_signals() as interruption:
            return _dispatch(arguments, interruption)
    except InterruptedBySignal as interrupt:
        remedy = "; run the same command again to resume" if "source" in arguments else ""
        print(f"data-prep: stopped{remedy}.", file=sys.stderr)
        return 128 + interrupt.number
    except (ValueError, OSError) as error:
        print(f"data-prep: {_describe(error)}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"data-prep: {error}", file=sys.stderr)
        return 1


def _dispatch(arguments: argparse.Namespace, interruption: Interruption) -> int:
    match arguments.command:
        case "shard" | "reshard":
            return _shard(arguments, interruption)
        case "merge":
            manifest = merge_parts(Path(arguments.folder), max_rejected=arguments.max_rejected)
            print(_describe_set(manifest, "complete"))
            return 0
        case "index":
            return _index(arguments, interruption)
        case "verify":
            return _verify(arguments, interruption)
        case command:
            assert command == "info", command
            return _info(arguments, interruption)


def _shard(arguments: argparse.Namespace, interruption: Interruption) -> int:
    source, destination = locate(arguments.source), locate(arguments.folder)
    if arguments.command == "shard":
        refuse_inside(source, destination)
    store = destination if isinstance(destination, RemotePath) else None
    folder = _staging(store, arguments) if store else Path(arguments.folder)
    with _bar() as bar:
        shown = _ProgressDisplay(bar, arguments.source)

        built = build_shards(
            source,
            folder,
            parse_options(arguments),
            store=store,
            shards=arguments.command == "reshard",
            execution=parse_execution(arguments),
            overwrite=arguments.overwrite,
            progress=Progress(
                listed=interruption.watch(shown.listed),
                planned=shown.planned,
                counted=shown.counted,
                tick=interruption.watch(bar.update),
                finished=shown.finished,
                uploaded=shown.uploaded,
            ),
        )
    print(_describe_built(built, arguments.folder))
    return 0


class _ProgressDisplay:
    """Progress bar with listing progress, MB/s, rejected images and uploads."""

    def __init__(self, bar: "tqdm[NoReturn]", source: str) -> None:
        self._bar, self._source = bar, source
        self._bytes = self._bad = 0
        self._sent = ""
        self._started = time.monotonic()

    def listed(self, found: int) -> None:
        self._bar.set_description_str(f"listing, {found:,} found so far" if found else "listing")

    def planned(self, plan: PlanSummary) -> None:
        print(_describe_plan(plan, self._source))
        self._bar.set_description_str("")
        self._bar.total, self._bar.initial, self._bar.n = plan.found, plan.done, plan.done
        self._bar.refresh()

    def counted(self, found: int) -> None:
        """Set the total, now that all images are listed."""
        self._bar.set_description_str("")
        self._bar.total = found

    def finished(self, report: ShardReport) -> None:
        """Count a finished shard."""
        self._bytes += report.entry.bytes if report.entry else 0
        self._bad += len(report.rejected)
        self._show()

    def uploaded(self, shards: int, sent: int) -> None:
        """Show the progress of uploads."""
        self._sent = f", uploaded {_count(shards, 'shard')}, sent {format_bytes(sent)}"
        self._show()

    def _show(self) -> None:
        seconds = max(1e-3, time.monotonic() - self._started)
        speed = f"{self._bytes / seconds / 1e6:.1f} MB/s"
        self._bar.set_postfix_str(f"{speed}, bad {self._bad:,}{self._sent}")


def _staging(destination: RemotePath, arguments: argparse.Namespace) -> Path:
    """Return the local folder of shards before their upload, the same for every run."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parent = arguments.staging or caches / "data-prep"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(parent, hashlib.sha256(destination.url.encode()).hexdigest()[:16])


def _index(arguments: argparse.Namespace, interruption: Interruption) -> int:
    with _bar() as bar:
        indexed = index_existing(
            _tars(arguments),
            output=arguments.output,
            overwrite=arguments.overwrite,
            workers=arguments.workers,
            tick=interruption.watch(bar.update),
        )
    manifest = indexed.manifest
    print(
        f"{_count_samples(manifest)}, {_count(len(manifest.classes), 'class', 'classes')}, "
        f"in {manifest.folder}"
    )
    if indexed.without_image:
        print(f"left out: {_count(indexed.without_image, 'sample')} without an image")
    if indexed.empty:
        print(f"left out: tars without any image: {', '.join(indexed.empty)}")
    return 0


def _tars(arguments: argparse.Namespace) -> Location | PipedFile:
    """Return the tars for `index`; commands only if they may run."""
    if arguments.folder.startswith(PIPE) and arguments.allow_pipe:
        return PipedFile(arguments.folder.removeprefix(PIPE))
    return locate(arguments.folder)


def _verify(arguments: argparse.Namespace, interruption: Interruption) -> int:
    manifest = read_manifest(arguments.folder, allow_pipe=arguments.allow_pipe)
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        found = verify_shards(manifest, decode=arguments.deep, workers=arguments.workers, tick=tick)
    for note, count in sorted(found.notes.items()):
        print(f"{note}: {count:,}")
    if found.count:
        number = _count(found.count, "problem")
        lines = [f"data-prep: {manifest.folder} has {number}; write the shards again:"]
        lines += found.problems
        if found.count > len(found.problems):
            lines.append(f"and {found.count - len(found.problems):,} more")
        print("\n  ".join(lines), file=sys.stderr)
        return 2
    checked = "checksums, indexes and images" if arguments.deep else "checksums and indexes"
    print(f"{_count_samples(manifest)}: {checked} are correct")
    if not arguments.deep and manifest.options.get("check") is not True:
        print("the images of this set were never decoded; use --deep to decode them")
    return 0


def _info(arguments: argparse.Namespace, interruption: Interruption) -> int:
    manifest = read_manifest(arguments.folder, allow_pipe=arguments.allow_pipe)
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        text = describe_shards(manifest, workers=arguments.workers, tick=tick)
    print(text)
    if arguments.contact_sheet is not None:
        draw_contact_sheet(manifest, arguments.contact_sheet)
        print(f"contact sheet in {arguments.contact_sheet}")
    if not arguments.statistics:
        return 0
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        measured = measure_set(manifest, workers=arguments.workers, tick=tick)
    if measured.unreadable:
        number = _count(len(measured.unreadable), "image")
        lines = [f"data-prep: no {STATISTICS_NAME} written, since {number} cannot be decoded:"]
        lines += measured.unreadable[:MAX_PROBLEMS]
        print("\n  ".join(lines), file=sys.stderr)
        return 2
    write_statistics(manifest, measured.statistics)
    print(describe_statistics(measured.statistics))
    print(f"written to {manifest.folder / STATISTICS_NAME}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
        add_shard_arguments(command)
    merge = _add_command(commands, "merge", "combine the parts written with --part into one set")
    add_max_rejected(merge)
    index = _add_command(
        commands, "index", "write manifest and indexes for existing WebDataset tars"
    )
    index.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
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
    for command in (index, verify, info):
        command.add_argument(
            "--allow-pipe",
            action="store_true",
            help="allow shards that are the output of commands, which are run: "
            "index 'pipe:COMMAND' --output FOLDER",
        )
    for command in (shard, reshard, index, verify, info):
        _add_workers(command)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, about: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if name == "shard":
        about = (
            "folder, zip, uncompressed tar or list (txt, tsv, csv, parquet) of images; path or URL"
        )
        parser.add_argument("source", help=about)
    elif name == "reshard":
        parser.add_argument("source", help="folder of WebDataset tars; path or URL")
    parser.add_argument("folder", help="folder of shards; path or URL (s3, gs, http)")
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=positive,
        default=available_cores(),
        metavar="N",
        help="number of processes; the bytes written do not depend on it",
    )


def _bar(total: int | None = None) -> "tqdm[NoReturn]":
    from tqdm import tqdm  # noqa: PLC0415 - `--help` does without

    # disable=None: drawn only on a terminal.
    return tqdm(total=total, unit=" images", unit_scale=True, disable=None, dynamic_ncols=True)


def _describe_plan(plan: PlanSummary, source: str) -> str:
    if plan.found is None or plan.shards is None:
        text = f"found {_count(plan.classes, 'class', 'classes')} in {source}"
        if plan.finished:
            text += f"; {_count(plan.finished, 'shard')} already finished"
        return f"{text}; writing shards while images are listed, {plan.workers} at a time"
    classes = _count(plan.classes, "class", "classes")
    text = f"found {_count(plan.found, 'image')} and {classes} in {source}"
    if plan.finished:
        text += f"; {plan.finished:,} of {_count(plan.shards, 'shard')} already finished"
    remaining = _count(plan.shards - plan.finished, "shard")
    return f"{text}; writing {remaining}, {plan.workers} at a time"


def _describe_built(built: BuildResult, folder: str) -> str:
    if built.manifest is None:
        return f"this part is complete; when all parts are, run: data-prep merge {folder}"
    verb = "already complete" if built.was_complete else "complete"
    return _describe_set(built.manifest, verb)


def _describe_set(manifest: Manifest, verb: str) -> str:
    length = format_bytes(sum(shard.bytes for shard in manifest.shards))
    found = manifest.samples + manifest.rejected
    counts = f"accepted {manifest.samples:,} + rejected {manifest.rejected:,} = {found:,} found"
    if manifest.rejected:
        counts += f"; see {manifest.folder / REJECTED_NAME}"
    for note, count in sorted(manifest.notes.items()):
        counts += f"\n{note}: {count:,}"
    shards = _count(len(manifest.shards), "shard")
    return f"{counts}\n{verb}: {shards}, {length}, in {manifest.folder}"


def _count_samples(manifest: Manifest) -> str:
    return f"{_count(manifest.samples, 'sample')} in {_count(len(manifest.shards), 'shard')}"


def _count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun in singular or plural."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _describe(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        return f"cannot continue{place}: {error.strerror}."
    return str(error)
